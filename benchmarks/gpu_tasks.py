"""The models of `benchmarks.gpu`: a perceptron, a convolutional net and a small GPT."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc.protocols import Precision


class Block(nn.Module):
    """A transformer block: attention and a perceptron with residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        # (batch, tokens, width) -> 3 x (batch, heads, tokens, width / heads)
        parts = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        output: Tensor = hidden + self.mlp(self.norms[1](hidden))
        return output


class GPT(nn.Module):
    """Maps tokens (batch, tokens) to logits (batch, tokens, vocabulary)."""

    def __init__(self, vocabulary: int, tokens: int, width: int, layers: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.position)))
        return output


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Task:
    """A model with its data and optimizer."""

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], TensorDataset]
    make_optimizer: Callable[[nn.Module], Optimizer]
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy


def make_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-3, momentum=0.9)


def make_adam(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-4)


def perceptron(_: bool) -> Task:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def make_data() -> TensorDataset:
        return TensorDataset(torch.randn(32 * 1024, 64), torch.randint(10, (32 * 1024,)))

    return Task(make_model, make_data, make_sgd, batch_size=32)


def convolutions(quick: bool) -> Task:
    side, batches, size = (16, 8, 16) if quick else (64, 32, 128)

    def make_model() -> nn.Module:
        widths = [3, 16, 32, 64] if quick else [3, 128, 256, 512]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def make_data() -> TensorDataset:
        return TensorDataset(torch.randn(size * batches, 3, side, side), torch.randint(10, (size * batches,)))

    return Task(make_model, make_data, make_sgd, size)


def language(quick: bool) -> Task:
    vocabulary, tokens, width, layers, size = (256, 32, 64, 2, 4) if quick else (16384, 512, 768, 8, 16)

    def make_data() -> TensorDataset:
        text = torch.randint(vocabulary, (size * 64, tokens + 1))
        return TensorDataset(text[:, :-1].contiguous(), text[:, 1:].contiguous())

    return Task(lambda: GPT(vocabulary, tokens, width, layers), make_data, make_adam, size, token_loss)


@dataclass(frozen=True)
class Case:
    """A task with the settings to measure."""

    make_task: Callable[[bool], Task]
    precision: Precision = "no"
    is_compiled: bool = False
    pins: bool = True


CASES = {
    "mlp": Case(perceptron),
    "conv": Case(convolutions, "bf16"),
    "conv, not pinned": Case(convolutions, "bf16", pins=False),
    "gpt bf16": Case(language, "bf16"),
    "gpt fp16": Case(language, "fp16"),
    "gpt bf16, compiled": Case(language, "bf16", is_compiled=True),
    "gpt fp16, compiled": Case(language, "fp16", is_compiled=True),
}
