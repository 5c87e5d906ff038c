"""Parts come back from files as they were, so that training continues as if it had not been interrupted."""

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from ptacc.checkpoint.parts import (
    SHARED,
    Snapshot,
    check_storable,
    encode_parts,
    rank_files,
    read_parts,
    write_parts,
)
from ptacc.errors import CheckpointError, DamagedCheckpointError, MissingPartError
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import CheckpointStore


def through_files(directory: Path, parts: Mapping[str, object]) -> Snapshot:
    """Write parts to a checkpoint, and read them back."""
    store = CheckpointStore(str(directory))
    pending = store.begin("step-1")
    files = write_parts(store, pending, SHARED, encode_parts(parts))
    manifest = store.commit(pending, Manifest("", "run", 1, 0, 1, 1, parts=tuple(parts), files=files))
    return read_parts(store, store.verify(manifest.name), SHARED)


def test_parts_come_back_by_their_names(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(2, 3), "bias": torch.zeros(0)}
    back = through_files(tmp_path, {"model": weights, "progress": {"steps": 3}})
    assert torch.equal(back["model"]["weight"], weights["weight"])
    assert back["progress"] == {"steps": 3}


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPartError, match=r"no part 'ema'.* It has: model"):
        through_files(tmp_path, {"model": {}})["ema"]


def test_each_rank_has_files_of_its_own(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    pending = store.begin("step-1")
    encoded = [encode_parts({"random": rank}) for rank in (0, 1)]
    files = {k: v for rank in (0, 1) for k, v in write_parts(store, pending, rank_files(rank), encoded[rank]).items()}
    manifest = store.commit(pending, Manifest("", "run", 1, 0, 1, 2, files=files))
    assert [read_parts(store, manifest, rank_files(rank))["random"] for rank in (0, 1)] == [0, 1]


@pytest.mark.parametrize("text", [b"[1, 2]", b"{", b"[" * 100_000, b'"\\ud800"', b"\xff"])
def test_a_file_that_holds_no_parts_is_damage(text: bytes, tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    pending = store.begin("step-1")
    files = {"shared.json": store.write(pending, "shared.json", [text])}
    with pytest.raises(DamagedCheckpointError):
        read_parts(store, store.commit(pending, Manifest("", "run", 1, 0, 1, 1, files=files)), SHARED)


@pytest.mark.parametrize("state", [lambda: None, {"a": torch.zeros(1, dtype=torch.complex128)}, [object()]])
def test_what_cannot_be_stored_is_known_before_the_first_save(state: object) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be stored|cannot store"):
        check_storable({"odd": state})


# ---- what torch ships


def subclasses_in(module: object, base: type) -> list[type]:
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return sorted({kind for kind in found if kind is not base and not kind.__name__.startswith("_")}, key=repr)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)], o
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 6, 7]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.MultiStepLR(o, [2, 4])], milestones=[3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3),
}


def test_every_scheduler_is_tried() -> None:
    shipped = {kind.__name__ for kind in subclasses_in(lr_scheduler, lr_scheduler.LRScheduler)}
    assert shipped - {"LRScheduler", "SWALR"} == set(SCHEDULERS)


class Work:
    """A model, its optimizer and its schedule, at work."""

    def __init__(self, make_optimizer: Callable[[Any], optim.Optimizer], make_scheduler: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 4, bias=False)
        self.optimizer = make_optimizer([self.model.weight])
        self.scheduler = make_scheduler(self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))

            def compute(inputs: torch.Tensor = inputs) -> float:
                self.optimizer.zero_grad()
                loss: torch.Tensor = self.model(inputs).square().mean()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            loss = compute()
            self.optimizer.step(compute)
            is_plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(loss) if is_plateau else self.scheduler.step()

    def parts(self) -> dict[str, object]:
        holders = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: copy.deepcopy(holder.state_dict()) for name, holder in holders.items()}


def check_resumes(make: Callable[[], Work], directory: Path) -> None:
    whole, saved, resumed = make(), make(), make()
    whole.train(range(10))
    saved.train(range(5))
    back = through_files(directory, saved.parts())
    resumed.model.load_state_dict(back["model"])
    resumed.optimizer.load_state_dict(back["optimizer"])
    resumed.scheduler.load_state_dict(back["scheduler"])
    resumed.train(range(5, 10))
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the order of calls, and of epochs given to chained schedules
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_resumes(name: str, tmp_path: Path) -> None:
    check_resumes(lambda: Work(lambda weights: optim.SGD(weights, lr=0.1, momentum=0.9), SCHEDULERS[name]), tmp_path)


SPARSE = {"SparseAdam"}  # takes sparse gradients only


@pytest.mark.parametrize("kind", [k for k in subclasses_in(optim, optim.Optimizer) if k.__name__ not in SPARSE])
def test_an_optimizer_resumes(kind: type[optim.Optimizer], tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 0.01} if "lr" in inspect.signature(kind).parameters else {}
    check_resumes(lambda: Work(lambda weights: kind(weights, **options), SCHEDULERS["StepLR"]), tmp_path)


def test_a_state_as_plain_json_would_not_come_back() -> None:
    milestones = lr_scheduler.MultiStepLR(optim.SGD([torch.zeros(1)], lr=0.1), [2]).state_dict()["milestones"]
    assert json.loads(json.dumps(milestones)) != milestones


@pytest.mark.parametrize("tensor", [torch.arange(6.0).reshape(2, 3).T, torch.arange(4.0)[::2][:1], torch.ones(())])
def test_a_tensor_may_lie_in_memory_as_it_likes(tensor: torch.Tensor, tmp_path: Path) -> None:
    assert torch.equal(through_files(tmp_path, {"odd": tensor})["odd"], tensor)
