"""A run to be killed: what it logs, and what it ends with."""

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    EpochRecord,
    EvalResult,
    LRSchedulerMixin,
    RunHistory,
    RunPlan,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.files.filesystem import FileSystem
from ptacc.protocols import SchedulerFactory
from ptacc.rng import RandomStreams
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data
from ptacc.testing.laws import same
from ptacc.types.protocols import Stateful
from tests.records import read_lines, timeless

SAMPLES = 12
STEPS = 6
"""Steps of four samples in two epochs."""


def cosine(optimizer: Optimizer, plan: RunPlan) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, plan.total_steps)


class KillableTrainer(CheckpointMixin, EarlyStoppingMixin, LRSchedulerMixin, EMAMixin, SeedMixin, Trainer):
    """Draws random numbers, has much state in addition to its weights, and logs what happens."""

    seed: int | None = 5
    ema_decay: float = 0.8
    early_stopping_patience = 100
    create_scheduler: SchedulerFactory = cosine
    filesystem: FileSystem = field(default_factory=FileSystem)
    trail: Path | None = None
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    streams: dict[str, Any] = field(init=False, metadata={"saved": False}, default_factory=dict)

    def note(self, what: str, **more: object) -> None:
        """Write an event to the trail."""
        if self.trail is not None:
            line = {"what": what, "at": time.monotonic(), "step": self.progress.steps, **more}
            descriptor = os.open(f"{self.trail}.{self._distributed.rank}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{json.dumps(line)}\n".encode())
            os.close(descriptor)

    @override
    def _store(self) -> CheckpointStore:
        return dataclasses.replace(super()._store(), filesystem=self.filesystem)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        time.sleep(self.step_seconds)
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.note("evaluating")
        time.sleep(self.evaluation_seconds)
        return super().eval_step(batch)

    @override
    def save_run_state(self) -> None:
        self.note("may save")
        super().save_run_state()
        self.note("may have saved")


class LogEvents(Callback[KillableTrainer]):
    """Logs events, and keeps the random states at the end."""

    @override
    def on_run_start(self, trainer: KillableTrainer) -> None:
        trainer.note("run start")

    @override
    def on_step_start(self, trainer: KillableTrainer) -> None:
        trainer.note("step start")

    @override
    def on_step_end(self, trainer: KillableTrainer, step: StepResult) -> None:
        trainer.note("step end")

    @override
    def on_evaluation_start(self, trainer: KillableTrainer, name: str) -> None:
        trainer.note("evaluation start")

    @override
    def on_evaluation_end(self, trainer: KillableTrainer, name: str, result: EvalResult) -> None:
        trainer.note("evaluation end")

    @override
    def on_epoch_end(self, trainer: KillableTrainer, record: EpochRecord) -> None:
        trainer.note("epoch end")

    @override
    def on_save(self, trainer: KillableTrainer, path: str | Path) -> None:
        trainer.note("saved", path=str(path))

    @override
    def on_run_end(self, trainer: KillableTrainer) -> None:
        trainer.note("run end")
        trainer.streams = RandomStreams().state_dict()


@dataclass
class End:
    """What a run ended with: everything, the clock aside."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    states: dict[str, Any]
    random: dict[str, Any]
    reason: str | None
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    file: list[dict[str, Any]]

    def differences(self, other: "End") -> list[str]:
        """Return the names of what is not the same to the last bit."""
        return [name for name, mine in vars(self).items() if not same(mine, vars(other)[name])]


def history_file(directory: Path) -> Path:
    """Return where a run in a directory writes its history: in a directory that is not there yet."""
    return directory / "logs" / "history.jsonl"


def in_memory() -> Path | None:
    """Return a directory in memory, where what is synced waits for no disk; None where there is none."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def open_run_store(directory: Path) -> CheckpointStore:
    return CheckpointStore(str(directory / "checkpoints"))


def make(directory: Path, **options: Any) -> KillableTrainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)).double()
    given: dict[str, Any] = {
        "optimizer": torch.optim.Adam(net.parameters(), lr=0.02),
        "checkpoint_dir": directory / "checkpoints",
        "history_file": history_file(directory),
        **options,
    }
    return KillableTrainer(net, loss_func=nn.CrossEntropyLoss(), default_callbacks=(), callbacks=[LogEvents()], **given)


def train(trainer: KillableTrainer, samples: int = SAMPLES, **options: Any) -> End:
    """Train two epochs of steps of four samples, or what is left of them."""
    batch = 4 // trainer.distributed.world_size
    given: dict[str, Any] = {"num_epochs": 2, "per_device_batch_size": batch, **options}
    return read_end(trainer, trainer.train(tiny_data(samples), tiny_data(12), **given))


def read_end(trainer: KillableTrainer, history: RunHistory) -> End:
    states = {key.name: state for key, state in trainer.run.states() if isinstance(state, Stateful)}
    return End(
        weights=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        states={name: state.state_dict() for name, state in states.items() if name != "checkpoints"},
        random=trainer.streams,
        reason=history.stop_reason,
        epochs=[timeless(asdict(epoch)) for epoch in history],
        steps=[timeless(asdict(step)) for step in history.steps],
        file=read_results(Path(str(trainer.history_file))) if trainer.distributed.rank == 0 else [],
    )


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file, without the directory in its first line."""
    first, *others = read_lines(file)
    del first["checkpoints"]
    return [first, *others]


def save_each_step(directory: Path, **options: Any) -> End:
    trainer = make(directory, checkpoint_every=Steps(1), keep_last=2, **options)
    return train(trainer)


# ---- what a kill leaves


def intact_checkpoints(directory: Path) -> list[Manifest]:
    """Return the checkpoints of a run, the newest first, and fail if one that has a name is torn."""
    manifests: list[Manifest] = []
    for name, found in open_run_store(directory).verified():
        assert isinstance(found, Manifest), f"{name}: {found}"
        manifests.append(found)
    return manifests


def check_cleaned_up(directory: Path) -> None:
    """Fail if a run that has ended left anything in addition to its checkpoints."""
    store = open_run_store(directory)
    assert sorted(path.name for path in Path(store.directory).iterdir()) == store.names()


def check_resumes(directory: Path, whole: End, least: int, most: int, **options: Any) -> None:
    """Check what a kill has left, when between `least` and `most` saves were complete, and resume it."""
    left = intact_checkpoints(directory)
    newest = left[0].sequence if left else 0
    assert least <= newest <= most
    assert [manifest.step for manifest in left][:1] == ([newest] if newest else [])
    end = save_each_step(directory, resume=True, **options)
    assert end.differences(whole) == []
    check_cleaned_up(directory)


def run_for_exit_code(do: Callable[[], object]) -> int:
    """Do something in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            do()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class StopAt(Callback[TrainerCore]):
    """Ends a run at a step, None for never."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            trainer.stop("enough for now")


def make_leg(kind: Any, net: nn.Module, directory: Path, until: int | None, **options: Any) -> Any:
    """Return a trainer that resumes the run in a directory and stops it at a step."""
    return kind(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        default_callbacks=(),
        callbacks=[StopAt(until)],
        checkpoint_dir=directory,
        checkpoint_every=None,
        resume=True,
        resume_ignore={"stop"},
        **options,
    )
