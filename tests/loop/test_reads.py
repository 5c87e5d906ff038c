"""A step reads from the device no more often than a plain loop with the same model, data and optimizer.

Reads are counted where tensor operations are dispatched. On the CPU, `tolist` and `numpy` dispatch nothing, so they are
counted where Python calls them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    AMPMixin,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    Epochs,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    ProfilerMixin,
    ProgressBar,
    RunPlan,
    SeedMixin,
    Steps,
    Throughput,
    TrackingMixin,
    Trainer,
    default_callbacks,
)
from ptacc.distributed import stop_vote
from ptacc.run.history import STEPS_IN_MEMORY
from ptacc.run.running_loss import RunningLoss
from ptacc.tracking import JSONLinesTracker
from ptacc.trainers import loss_items
from tests.ranks import run_ranks

READING = {
    "_local_scalar_dense",  # item(), float(), int(), bool()
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",  # the shapes of their results depend on values
    "masked_select",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}
UNDISPATCHED = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
MOVING = {"copy_", "_to_copy"}
"""They wait if source and destination are on different devices."""
INDEXING = {"index", "index_put_", "index_put"}
"""They read an index that is a boolean mask."""

MANY, MORE = 100, 160
BATCH = 4


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves these unannotated
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.overloadpacket.__name__
        devices = {value.device for value in (*args, result) if isinstance(value, Tensor)}
        moves = kind in MOVING and len(devices) > 1
        masks = kind in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if kind in READING or moves or masks:
            self.counts[kind] += 1
        return result


class Called(TorchFunctionMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UNDISPATCHED:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Generator[Counter[str]]:
    counts: Counter[str] = Counter()
    with Called(counts), Dispatched(counts):
        yield counts


# ---- the counter


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        float,
        int,
        bool,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.nonzero,
        torch.unique,
        lambda tensor: torch.equal(tensor, tensor.clone()),
        lambda tensor: torch.allclose(tensor, tensor),
        lambda tensor: torch.ones(1)[tensor.bool().reshape(1)],
        lambda tensor: tensor.isfinite().all() and tensor,
        lambda tensor: f"{tensor:.3f}",
        lambda tensor: torch.empty_like(tensor, device="meta").copy_(tensor),
        lambda tensor: tensor.to("meta"),
        lambda tensor: clip_grad_norm_(with_gradient(tensor), 1.0, error_if_nonfinite=True),
    ],
)
def test_a_read_is_counted(read: Callable[[Tensor], object]) -> None:
    with counting() as counts:
        read(torch.tensor(0.5))
    assert sum(counts.values()) >= 1


def with_gradient(tensor: Tensor) -> Tensor:
    tensor.grad = tensor.clone()
    return tensor


@pytest.mark.parametrize(
    "compute",
    [lambda tensor: tensor + 1, Tensor.clone, lambda tensor: tensor.to(torch.float64), Tensor.detach, Tensor.isfinite],
)
def test_other_operations_are_not_counted(compute: Callable[[Tensor], object]) -> None:
    with counting() as counts:
        compute(torch.tensor(0.5))
    assert not counts


# ---- the loops


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # noqa: SLF001  # torch has no other way
            return function(*args)

    return call


@pytest.fixture(autouse=True)
def _host_reads_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out reads that are made only where the value is on the host: if the device is the CPU, they look alike."""
    monkeypatch.setattr(loss_items, "contains", uncounted(loss_items.contains))
    monkeypatch.setattr(RunningLoss, "add", uncounted(RunningLoss.add))


def parts(make: Callable[[Any], Optimizer], samples: int = BATCH * 200) -> tuple[nn.Module, Optimizer, TensorDataset]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(samples, 4), torch.randint(0, 3, (samples,)))
    return model, make(model.parameters()), data


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.1),  # counts its steps in tensors, and reads them
    "fused": lambda parameters: Adam(parameters, lr=0.1, fused=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def decaying(optimizer: Optimizer, plan: RunPlan | None = None) -> StepLR:
    return StepLR(optimizer, 10, gamma=0.9)


def train_plainly(steps: int, optimizer: str, *, clips: bool = False) -> None:
    model, made, data = parts(OPTIMIZERS[optimizer])
    schedule = decaying(made)
    loss_func = nn.CrossEntropyLoss()
    for step, (inputs, targets) in enumerate(DataLoader(data, batch_size=BATCH, shuffle=True), start=1):
        loss_func(model(inputs), targets).backward()
        if clips:
            clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        made.zero_grad()
        if clips:
            schedule.step()
        if step == steps:
            return


def train_without_mixins(steps: int, optimizer: str, **options: Any) -> None:
    model, made, data = parts(OPTIMIZERS[optimizer])
    given: dict[str, Any] = {"default_callbacks": (), "log_every": None, **options}
    trainer = Trainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=made, **given)
    trainer.train(data, max_steps=steps, per_device_batch_size=BATCH)


class Composed(
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    EarlyStoppingMixin,
    SeedMixin,
    CheckpointMixin,
    EMAMixin,
    ProfilerMixin,
    TrackingMixin,
    Trainer,
): ...


def train_composed(steps: int, optimizer: str, folder: Path) -> None:
    model, made, data = parts(OPTIMIZERS[optimizer])
    trainer = Composed(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=made,
        mixed_precision="no",
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        max_grad_deviations=4.0,
        create_scheduler=decaying,
        metrics={"accuracy": MulticlassAccuracy(3)},
        seed=0,
        ema_decay=0.99,
        checkpoint_dir=folder / str(steps),
        trackers=[JSONLinesTracker(folder / str(steps) / "values.jsonl")],
        checkpoint_every=Epochs(1),
        callbacks=[Throughput()],
        log_every=None,
    )
    trainer.train(data, data, max_steps=steps, per_device_batch_size=BATCH)


def count_reads(train: Callable[[int], None]) -> dict[str, float]:
    """Return the reads of each kind that a step makes on average, in the middle of an epoch."""
    totals: list[Counter[str]] = []
    for steps in (MANY, MORE):
        with counting() as counts:
            train(steps)
        totals.append(counts)
    kinds = totals[0].keys() | totals[1].keys()
    return {kind: per for kind in kinds if (per := (totals[1][kind] - totals[0][kind]) / (MORE - MANY))}


# ---- reads of a step


@every_optimizer
def test_a_trainer_without_mixins_reads_as_often_as_a_plain_loop(optimizer: str) -> None:
    plain = count_reads(lambda steps: train_plainly(steps, optimizer))
    assert count_reads(lambda steps: train_without_mixins(steps, optimizer)) == plain


def test_a_loop_that_reads_its_loss_is_detected() -> None:
    def train_reading(steps: int) -> None:
        for _ in range(steps):
            float(torch.ones(()))

    assert count_reads(train_reading) == {"_local_scalar_dense": 1.0}
    assert count_reads(lambda steps: train_plainly(steps, "sgd")) == {}


@every_optimizer
def test_default_callbacks_read_nothing_more(optimizer: str) -> None:
    plain = count_reads(lambda steps: train_plainly(steps, optimizer))

    def train(steps: int) -> None:
        train_without_mixins(steps, optimizer, default_callbacks=default_callbacks())

    assert count_reads(train) == plain


@every_optimizer
def test_ten_mixins_read_nothing_more(optimizer: str, tmp_path: Path) -> None:
    plain = count_reads(lambda steps: train_plainly(steps, optimizer, clips=True))
    assert count_reads(lambda steps: train_composed(steps, optimizer, tmp_path)) == plain


def test_a_visible_progress_bar_reads_nothing_more(tmp_path: Path) -> None:
    with (tmp_path / "bar").open("w") as file:
        bar = ProgressBar(refresh_seconds=1e-9, file=file, shown=True)
        assert count_reads(lambda steps: train_without_mixins(steps, "sgd", callbacks=[bar])) == {}


# ---- reads every n steps


def test_the_history_is_read_together_every_thousand_steps() -> None:
    def reads(steps: int) -> int:
        model, made, data = parts(OPTIMIZERS["sgd"], samples=3 * STEPS_IN_MEMORY)
        loss_func = nn.CrossEntropyLoss()
        trainer = Trainer(model, loss_func=loss_func, optimizer=made, default_callbacks=(), log_every=None)
        with counting() as counts:
            trainer.train(data, max_steps=steps, per_device_batch_size=1)
        return counts["tolist"]

    few = reads(10)
    assert [reads(STEPS_IN_MEMORY * times + 1) - few for times in (1, 2)] == [1, 2]


def test_each_report_reads_once() -> None:
    assert count_reads(lambda steps: train_without_mixins(steps, "sgd", log_every=Steps(10))) == {"tolist": 0.1}


def test_each_stop_vote_reads_one_number_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_vote, "CLOCK_VOTE_SECONDS", 60.0)  # slow steps on a busy machine would vote more often

    def train(steps: int) -> None:
        model, made, data = parts(OPTIMIZERS["sgd"])
        loss_func = nn.CrossEntropyLoss()
        trainer = Trainer(model, loss_func=loss_func, optimizer=made, default_callbacks=(), log_every=None)
        trainer.train(data, max_steps=steps, per_device_batch_size=BATCH // 2, stop_check_every=10)

    assert run_ranks(lambda: count_reads(train), 2) == [{"tolist": 0.1}] * 2
