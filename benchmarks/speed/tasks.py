"""Tasks: models with their training data, the same on every machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from typing_extensions import override

LENGTH = 64
"""The number of characters in a text sample."""


@dataclass(frozen=True)
class Task:
    """A model, its data and its optimizer.

    Args:
        make_model: Creates the model. The caller sets the seed.
        make_data: Returns inputs and targets, one sample per row.
        make_optimizer: Creates the optimizer of a model.
        batch_size: The number of samples per batch.
    """

    make_model: Callable[[], nn.Module]
    make_data: Callable[[], tuple[Tensor, Tensor]]
    make_optimizer: Callable[[nn.Module], Optimizer]
    batch_size: int


# ---- a tiny perceptron: its steps are short, so the overhead is visible


def make_perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def make_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


@functools.cache
def make_random_data() -> tuple[Tensor, Tensor]:
    """Return 256 batches of 32."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8192, 64, generator=generator), torch.randint(10, (8192,), generator=generator)


def make_half_of_random_data() -> tuple[Tensor, Tensor]:
    """Return 128 batches of 32, for loaders whose batches take longer."""
    inputs, targets = make_random_data()
    return inputs[:4096], targets[:4096]


def make_one_batch() -> tuple[Tensor, Tensor]:
    inputs, targets = make_random_data()
    return inputs[:32], targets[:32]


# ---- a small convolutional net on scanned digits


def make_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),  # (items, 32, 8, 8)
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (items, 64, 4, 4)
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def make_adam(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-3)


@functools.cache
def load_digits() -> tuple[Tensor, Tensor]:
    """Return 40 batches of 32 from scikit-learn's scanned digits."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    return images[:1280].to(torch.float32).view(-1, 1, 8, 8) / 16, labels[:1280]


# ---- a small GPT on the text of Python's documentation


class SmallGPT(nn.Module):
    """Predicts the next character from the previous ones."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, 64), nn.Embedding(LENGTH, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(64, 128)

    @override
    def forward(self, text: Tensor) -> Tensor:
        """Return logits (samples, characters, length)."""
        hidden = self.characters(text) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(hidden).transpose(1, 2)
        return logits


@functools.cache
def load_text() -> tuple[Tensor, Tensor]:
    """Return 16 batches of 8 samples of Python's documentation."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    samples = torch.tensor(list(text[: 128 * LENGTH + 1]))
    return samples[:-1].view(128, LENGTH), samples[1:].view(128, LENGTH)


# ---- a large model for memory and checkpoints


def make_wide(width: int) -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def make_wide_data(width: int) -> tuple[Tensor, Tensor]:
    """Return one batch of 128."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(128, width, generator=generator), torch.randint(10, (128,), generator=generator)


def make_wide_task(width: int) -> Task:
    return Task(functools.partial(make_wide, width), functools.partial(make_wide_data, width), make_adam, 128)


PERCEPTRON = Task(make_perceptron, make_random_data, make_sgd, 32)
HALF_PERCEPTRON = Task(make_perceptron, make_half_of_random_data, make_sgd, 32)
CONVNET = Task(make_convnet, load_digits, make_adam, 32)
GPT = Task(SmallGPT, load_text, make_adam, 8)
ONE_STEP = Task(make_perceptron, make_one_batch, make_adam, 32)
SAVED = make_wide_task(2048)
LARGE = make_wide_task(4096)
