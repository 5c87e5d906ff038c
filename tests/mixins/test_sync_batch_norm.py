"""Synchronised batch norm equals that of one process with the global batch, however the batch is split."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typing_extensions import override

from ptacc import AMPMixin, GradAccumMixin, SeedMixin, StepResult, SyncBatchNormMixin, Trainer
from ptacc.errors import DataError, ModelError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import RankFailed, run_ranks

NORMS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "no weights": lambda: nn.BatchNorm1d(6, affine=False),
    "no statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "no bias": lambda: nn.BatchNorm1d(6, bias=False),
    "2d": lambda: nn.BatchNorm2d(3),
    "2d cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
}


class Synced(SeedMixin, GradAccumMixin, SyncBatchNormMixin, Trainer):
    seed: int | None = 5


class Plain(SeedMixin, GradAccumMixin, Trainer):
    seed: int | None = 5


@dataclass(frozen=True)
class Case:
    norm: str
    samples: int
    accumulation: int = 1
    batch_size: int = 4


def make_model(norm: str) -> nn.Module:
    torch.manual_seed(0)
    first: list[nn.Module]
    if norm.startswith("2d"):
        first = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1, bias=False)]
        return nn.Sequential(*first, NORMS[norm](), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)).double()
    # Includes a norm of the inputs, which have no gradient. A bias before a norm would have a zero gradient.
    first = [nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 6, bias=False)]
    return nn.Sequential(*first, NORMS[norm](), nn.Tanh(), nn.Linear(6, 2)).double()


def make_parts(model: nn.Module) -> dict[str, Any]:
    return {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def train(trainer_class: type[Plain] | type[Synced], case: Case, batch_size: int) -> dict[str, Tensor]:
    """Train, and return the loss of each step, the weights and the running statistics."""
    model = make_model(case.norm)
    trainer = trainer_class(**make_parts(model), gradient_accumulation_steps=case.accumulation)
    history = trainer.train(tiny_data(case.samples), num_epochs=2, per_device_batch_size=batch_size)
    assert not any("forward" in vars(module) for module in model.modules())
    return {"losses": torch.tensor([s.loss for s in history.steps], dtype=torch.float64), **model.state_dict()}


def train_all(cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    return [train(Synced, case, case.batch_size) for case in cases]


def distance(ours: Tensor, plain: Tensor) -> float:
    ours, plain = ours.double(), plain.double()
    return float((ours - plain).norm()) / (float(plain.norm()) or 1.0)


# ---- training on several processes


# The last global batch of 25 samples on 2 processes has one sample, that of 26 samples on 3 processes two: fewer than
# there are processes. Of one sample nothing but a convolution has more than one value for each channel.
SAMPLES = {(2, False): [24, 27], (2, True): [24, 25], (3, False): [24, 26], (3, True): [24, 25]}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_train_as_one_process_with_the_global_batch(world_size: int) -> None:
    cases = [
        Case(norm, samples, accumulation)
        for norm, accumulation in itertools.product(NORMS, (1, 2))
        for samples in SAMPLES[world_size, norm.startswith("2d")]
    ]
    ranks = run_ranks(train_all, world_size, cases, timeout=100)
    for case, *results in zip(cases, *ranks, strict=True):
        expected = train(Plain, case, case.batch_size * world_size)
        for result in results:
            far = {name: distance(result[name], expected[name]) for name in expected}
            assert max(far.values()) <= 1e-12, (case, far)
            assert result.keys() == expected.keys()


def without_the_option() -> list[float]:
    trainer = Synced(**make_parts(make_model("1d")), sync_batch_norm=False)
    return [step.loss for step in trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=4).steps]


def test_without_the_option_each_process_normalises_by_its_own_batch() -> None:
    synced = train(Plain, Case("1d", 24), 8)["losses"]
    losses = run_ranks(without_the_option, 2)
    assert losses[0] == losses[1]
    assert abs(losses[0][0] - float(synced[0])) > 1e-6


class Shards(IterableDataset[tuple[Tensor, Tensor]]):
    """Ranks have unequal amounts of data: the shorter ones repeat a batch as padding."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @override
    def __iter__(self) -> Iterator[Any]:
        return (tiny_data(24)[i] for i in range(24) if (i < 18) == (self.rank == 0))


def train_shards() -> list[float]:
    trainer = Synced(**make_parts(make_model("1d")))
    data = DataLoader(Shards(trainer.distributed.rank), batch_size=6)
    return [step.loss for step in trainer.train(data, max_steps=3, data_is_sharded=True).steps]


def test_padding_batches_do_not_count() -> None:
    order = [*range(6), *range(18, 24), *range(6, 18)]
    data = TensorDataset(*(tensor[order] for tensor in tiny_data(24).tensors))
    batches = [order[:12], order[12:18], order[18:]]
    positions = [[order.index(i) for i in batch] for batch in batches]
    trainer = Plain(**make_parts(make_model("1d")))
    expected = [s.loss for s in trainer.train(DataLoader(data, batch_sampler=positions), num_epochs=1).steps]
    for losses in run_ranks(train_shards, 2):
        assert losses == pytest.approx(expected, rel=1e-12)


def train_in_bfloat16() -> tuple[list[float], Tensor]:
    class Mixed(SeedMixin, SyncBatchNormMixin, AMPMixin, Trainer): ...

    model = make_model("2d").float()
    trainer = Mixed(**make_parts(model), mixed_precision="bf16", seed=0)
    data = TensorDataset(tiny_data(25).tensors[0].float(), tiny_data(25).tensors[1])
    history = trainer.train(data, num_epochs=5, per_device_batch_size=4)
    return [epoch.train_loss for epoch in history], model.state_dict()["2.running_var"]


def test_mixed_precision_trains() -> None:
    (losses, variance), (others_losses, others_variance) = run_ranks(train_in_bfloat16, 2)
    assert losses == others_losses
    assert losses[-1] < losses[0]
    assert variance.dtype == torch.float32
    assert torch.equal(variance, others_variance)


# ---- after the run, and invalid models


class Failing(Synced):
    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        patched = [name for name, module in self.unwrapped_model.named_modules() if "forward" in vars(module)]
        raise KeyError(patched)


def fail() -> list[str]:
    model = make_model("1d")
    norm = model.get_submodule("3")
    vars(norm)["forward"] = own = norm.forward  # an attribute of the user's own
    with pytest.raises(KeyError, match=r"\['0', '3'\]"):
        Failing(**make_parts(model)).train(tiny_data(), num_epochs=1, per_device_batch_size=4)
    assert vars(norm)["forward"] is own
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_an_exception_restores_the_model() -> None:
    assert run_ranks(fail, 2) == [["3"], ["3"]]


def test_one_process_patches_nothing() -> None:
    with pytest.raises(KeyError, match=r"\[\]"):
        Failing(**make_parts(make_model("1d"))).train(tiny_data(), num_epochs=1)


def train_on_one_sample() -> None:
    Synced(**make_parts(make_model("1d"))).train(tiny_data(9), num_epochs=1, per_device_batch_size=4)


def test_one_value_in_the_global_batch_is_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        Plain(**make_parts(make_model("1d"))).train(tiny_data(9), num_epochs=1)
    with pytest.raises(RankFailed, match=r"DataError: Expected more than 1 value per channel when training, got 1"):
        run_ranks(train_on_one_sample, 2)
    assert issubclass(DataError, ValueError)


class WithActivation(nn.BatchNorm1d):
    @override
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def train_with_an_activation() -> None:
    model = nn.Sequential(WithActivation(4), nn.Linear(4, 2)).double()
    with pytest.raises(ModelError, match=r"Synced: 0 is a WithActivation.*: sync_batch_norm=False"):
        Synced(**make_parts(model)).train(tiny_data(), num_epochs=1)


def test_a_norm_with_a_forward_of_its_own_is_refused() -> None:
    run_ranks(train_with_an_activation, 2)
    Synced(**make_parts(nn.Sequential(WithActivation(4), nn.Linear(4, 2)).double())).train(tiny_data(), num_epochs=1)
