"""A run with all that a checkpoint has to hold, what it ends with, and the same run as it is after a kill."""

import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    RunHistory,
    RunPlan,
    SeedMixin,
    StepOutput,
    Steps,
    Trainer,
)
from ptacc.core.hooks import TrainerCore
from ptacc.protocols import SchedulerFactory
from ptacc.rng import RandomStreams
from ptacc.testing.laws import same
from tests.records import read_lines, timeless

SAMPLES = 18


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples of six numbers, the first their index, the others drawn each time from all three generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
        values = torch.tensor([index, *noise, index / self.samples, 1.0], dtype=torch.float64)
        return values, torch.tensor(int(sum(noise) > 1.5))


class Centred(nn.Module):
    """Subtracts a running mean: as batch norm does, with buffers that its steps change, but for batches of one, too."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(inputs.detach().mean(dim=0), 0.1)
            self.count.add_(1)
        return inputs - self.mean


class Net(nn.Module):
    """Draws in its steps, and has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), Centred(8), nn.Dropout(0.3), nn.Linear(8, 2)).double()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs[:, 1:])
        return outputs


def cosine(optimizer: Optimizer, plan: RunPlan) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, plan.total_steps)


class Watching(Callback[TrainerCore]):
    """Notes the random states at a run's end."""

    def __init__(self) -> None:
        self.random: dict[str, Any] = {}

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.random = RandomStreams().state_dict()


class Full(
    CheckpointMixin,
    MetricsMixin,
    EarlyStoppingMixin,
    LRSchedulerMixin,
    EMAMixin,
    GradAccumMixin,
    GradClipMixin,
    SeedMixin,
    Trainer,
):
    """Much that has a state."""

    seed: int | None = 5
    ema_decay: float = 0.8
    max_grad_norm: float | None = 1.0
    early_stopping_patience = 100
    create_scheduler: SchedulerFactory = cosine
    seen: dict[int, list[list[int]]] = field(init=False, metadata={"saved": False}, default_factory=dict)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.seen.setdefault(self.progress.steps + 1, []).append(batch[0][:, 0].int().tolist())
        return super().train_step(batch)

    @override
    def update_metrics(self, batch: Any, output: Any, metrics: Any) -> None:
        scores = output.outputs.softmax(dim=1)[:, 1]
        for metric in metrics:
            metric.update(*([scores, batch[1]] if isinstance(metric, BinaryAUROC) else [scores]))


@dataclass
class End:
    """What a run ended with: everything, the clock aside."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Any]
    random: dict[str, Any]
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    seen: dict[int, list[list[int]]]
    file: list[dict[str, Any]]

    def differences(self, other: "End") -> list[str]:
        """Return the names of what is not the same to the last bit; of batches, those that both have seen."""
        mine, theirs = vars(self), vars(other)
        found = [name for name in mine if name != "seen" and not same(mine[name], theirs[name])]
        if any(self.seen[step] != other.seen[step] for step in self.seen.keys() & other.seen.keys()):
            found.append("seen")
        return found


def make(directory: Path, **options: Any) -> tuple[Full, Watching]:
    torch.manual_seed(0)
    net = Net()
    watching = Watching()
    trainer = Full(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=0.02),
        default_callbacks=(),
        callbacks=[watching],
        checkpoint_dir=directory,
        history_file=directory.parent / f"{directory.name}.jsonl",
        metrics={"mean": MeanMetric()},
        train_metrics={"auroc": BinaryAUROC()},
        **options,
    )
    return trainer, watching


def run(directory: Path, workers: int = 0, batch_size: int = 4, **options: Any) -> End:
    """Train three epochs, or what is left of them."""
    of_train: Any = {"num_epochs": 3, "evaluate_every": Steps(2)} | {
        name: options.pop(name) for name in ("num_epochs", "evaluate_every", "max_steps") if name in options
    }
    kwargs: Any = {"num_workers": workers, **({"persistent_workers": True, "timeout": 30.0} if workers else {})}
    trainer, watching = make(directory, **options)
    history: RunHistory = trainer.train(
        Augmented(), Augmented(6), per_device_batch_size=batch_size, train_dataloader_kwargs=kwargs, **of_train
    )
    return read_end(trainer, history, watching)


def read_end(trainer: Full, history: RunHistory, watching: Watching) -> End:
    file = Path(str(trainer.history_file))
    states = {key.name: state for key, state in trainer.run.states()}
    return End(
        weights=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        ema=states["ema"].state_dict(),
        random=watching.random,
        epochs=[timeless(asdict(epoch)) for epoch in history],
        steps=[timeless(asdict(step)) for step in history.steps],
        seen=trainer.seen,
        file=read_lines(file) if trainer.distributed.rank == 0 else [],
    )


def killed_after(directory: Path, name: str, into: Path) -> Path:
    """Return a copy of a run's directory as a kill leaves it after the checkpoint `name`: with a later, partial one."""
    for checkpoint in sorted(directory.glob("step-*")):
        if checkpoint.name <= name:
            shutil.copytree(checkpoint, into / checkpoint.name)
    (into / ".partial-step-99999999-dead").mkdir()
    shutil.copy(directory.parent / f"{directory.name}.jsonl", into.parent / f"{into.name}.jsonl")
    return into
