"""Models, data and trainer for tests of engines: ragged windows of scanned digits, and clipped gradients."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import EMAMixin, GradAccumMixin, GradClipMixin, SeedMixin, Trainer
from ptacc.engines.tensor_parallel import SplitName

GLOBAL_BATCH = 24
"""Samples of a step; the last step of an epoch has 17, of which two processes have 9 and 8."""
STEPS = 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.tanh(self.norm(self.linear(inputs)))


class Net(nn.Module):
    """Has widths that two ranks cannot share evenly."""

    def __init__(self, *, has_batch_norm: bool = False) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 33)
        self.blocks = nn.ModuleList(Block(33) for _ in range(3))
        self.norm = nn.BatchNorm1d(3) if has_batch_norm else nn.Identity()
        self.leave = nn.Linear(33, 10)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.enter(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        images = hidden.unflatten(1, (3, 11))  # so that a batch of one has a variance
        outputs: Tensor = self.leave(self.norm(images).flatten(1))
        return outputs


class Pair(nn.Module):
    """A column-wise and a row-wise split layer, after a norm that is not split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(33), nn.Linear(33, 48), nn.Linear(48, 33)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = inputs + self.down(torch.tanh(self.up(self.norm(inputs))))
        return outputs


SPLIT: Mapping[str, SplitName] = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
"""How the layers of a net of pairs are split."""


class PairNet(nn.Module):
    def __init__(self, *, has_batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 33)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        self.norm = nn.BatchNorm1d(3) if has_batch_norm else nn.Identity()
        self.leave = nn.Linear(33, 10)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(self.enter(inputs))
        for block in self.blocks:
            hidden = block(hidden)
        outputs: Tensor = self.leave(self.norm(hidden.unflatten(1, (3, 11))).flatten(1))
        return outputs


def make_pairs(*, has_batch_norm: bool = False) -> PairNet:
    torch.manual_seed(0)
    return PairNet(has_batch_norm=has_batch_norm)


def make(*, has_batch_norm: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(has_batch_norm=has_batch_norm)


def digits(samples: int = 281) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:samples] / 16, dtype=torch.float32), torch.tensor(labels[:samples]))


class Usual(SeedMixin, GradAccumMixin, GradClipMixin, Trainer):
    """The trainer below every engine: ragged windows of two batches on each rank, and clipped gradients."""

    seed: int | None = 1
    gradient_accumulation_steps: int = 2
    max_grad_norm: float | None = 0.5


class Averaging(EMAMixin, Usual):
    ema_decay: float = 0.8


@dataclass(frozen=True)
class Numbers:
    """The results of a run.

    Args:
        losses: Of each step.
        norms: Of each epoch's gradients, averaged.
        evaluations: Losses, in the run and after it.
        weights: At the end, by name.
    """

    losses: list[float]
    norms: list[float]
    evaluations: list[float]
    weights: dict[str, Tensor]


def check_equal(numbers: list[Numbers], expected: Numbers, *, rtol: float = 1e-5) -> None:
    """Check that all ranks have the expected numbers. Weights have a larger tolerance: Adam amplifies rounding."""
    for one in numbers:
        assert one.losses == pytest.approx(expected.losses, rel=rtol)
        assert one.norms == pytest.approx(expected.norms, rel=rtol)
        assert one.evaluations == pytest.approx(expected.evaluations, rel=rtol)
        torch.testing.assert_close(one.weights, expected.weights, rtol=10 * rtol, atol=10 * rtol)
        assert one.losses == numbers[0].losses


def make_optimizer(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    kind: type[Usual],
    *,
    make_model: Callable[..., nn.Module] = make,
    optimizer: str = "adamw",
    has_batch_norm: bool = False,
    samples: int = 281,
    **options: Any,
) -> Numbers:
    """Train 20 steps on digits; each replica has its share of the global batch."""
    model = make_model(has_batch_norm=has_batch_norm)
    trainer = kind(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model, optimizer),
        default_callbacks=(),
        **options,
    )
    size = GLOBAL_BATCH // trainer.gradient_accumulation_steps // trainer.distributed.replicas
    history = trainer.train(digits(samples), digits(70), num_epochs=2, max_steps=STEPS, per_device_batch_size=size)
    after = trainer.evaluate(digits(70), per_device_batch_size=size)
    evaluations = [*(epoch.eval_loss or 0.0 for epoch in history), after.loss]
    weights = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    return Numbers(
        [step.loss for step in history.steps],
        [epoch.logged["grad_norm"] for epoch in history],
        evaluations,
        weights,
    )
