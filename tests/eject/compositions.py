"""Compositions of mixins, and what they and their scripts compute."""

import importlib.util
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    AMPMixin,
    CompileMixin,
    DDPMixin,
    EarlyStoppingMixin,
    EMAMixin,
    Epochs,
    FreezeMixin,
    GradAccumMixin,
    GradCheckpointMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    RunPlan,
    SeedMixin,
    Steps,
    SWAMixin,
    SyncBatchNormMixin,
    Trainer,
    TrainingLoop,
)
from ptacc.distributed.accelerator import release_accelerator
from ptacc.eject.command import make_target
from ptacc.eject.script import make_script
from ptacc.protocols import DataLoaderKwargs

EPOCHS, BATCH, SAMPLES = 3, 8, 44


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=plan.total_steps)


def halving(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, step_size=plan.num_epochs // 3, gamma=0.5)


def plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


def make_metrics() -> dict[str, MulticlassAccuracy]:
    return {"accuracy": MulticlassAccuracy(3)}


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "seed": (SeedMixin, {"seed": 5}),
    "bf16": (AMPMixin, {"mixed_precision": "bf16"}),
    "compiled": (CompileMixin, {"compile_backend": "eager"}),
    "ddp": (DDPMixin, {"ddp_find_unused_parameters": True}),
    "synchronized": (SyncBatchNormMixin, {}),
    "frozen": (FreezeMixin, {"frozen": ["block.0"]}),
    "unfrozen": (FreezeMixin, {"frozen": ["block.1"], "unfreeze_at": {"block.0": Epochs(1), "head.bias": Steps(4)}}),
    "averaged": (EMAMixin, {"ema_decay": 0.8}),
    "averaged apart": (EMAMixin, {"ema_decay": 0.8, "ema_evaluates": False}),
    "swa": (SWAMixin, {"swa_start": 2}),
    "recomputed": (GradCheckpointMixin, {"gradient_checkpointing": ["ta*"]}),
    "accumulated": (GradAccumMixin, {"gradient_accumulation_steps": 2}),
    "clipped": (GradClipMixin, {"max_grad_norm": 0.5}),
    "clamped": (GradClipMixin, {"max_grad_norm": 0.5, "max_grad_value": 0.01}),
    "scheduled": (LRSchedulerMixin, {"create_scheduler": one_cycle}),
    "scheduled by epochs": (LRSchedulerMixin, {"create_scheduler": halving, "scheduler_interval": "epoch"}),
    "scheduled by values": (LRSchedulerMixin, {"create_scheduler": plateau, "scheduler_monitor": "train_loss"}),
    "measured": (MetricsMixin, {"metrics": make_metrics, "train_metrics": make_metrics}),
    "stopped": (EarlyStoppingMixin, {"early_stopping_patience": 1, "early_stopping_min_delta": 0.2}),
}
"""For each case a mixin, and its options."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12))
        self.tail = nn.Sequential(nn.Dropout(0.2), nn.Tanh(), nn.Linear(12, 12), nn.Dropout(0.2))
        self.head = nn.Linear(12, 3)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.tail(self.block(inputs)))
        return outputs


@dataclass
class Outcome:
    """What a run computed: the losses of training batches, the values of each epoch, and the weights."""

    losses: list[float]
    values: list[dict[str, float]]
    weights: dict[str, Tensor]


class RecordedLoss:
    """Cross-entropy that records each loss of a training batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = cross_entropy(outputs, targets)
        self.losses += [loss.item()] if torch.is_grad_enabled() else []
        return loss


def make_net() -> Net:
    torch.manual_seed(1)
    return Net()


def make_optimizer(net: nn.Module) -> Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.02)


def make_data(samples: int) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples + 20, 5, generator=generator)
    targets = inputs[:, :3].argmax(dim=1)
    return TensorDataset(inputs[:samples], targets[:samples]), TensorDataset(inputs[samples:], targets[samples:])


def make_trainer(cases: Iterable[str], loss: RecordedLoss, **options: Any) -> Trainer:
    net = make_net()
    options |= {"model": net, "optimizer": make_optimizer(net), "loss_func": loss}
    options.setdefault("default_callbacks", ())
    for case in cases:
        options |= {name: value() if value is make_metrics else value for name, value in CASES[case][1].items()}
    mixins = dict.fromkeys(CASES[case][0] for case in cases)
    trainer: Trainer = type("Composed", (*mixins, Trainer), {})(**options)
    return trainer


def train(trainer: TrainingLoop[Any, Any], losses: list[float], samples: int = SAMPLES) -> Outcome:
    """Train with ptacc."""
    data, eval_data = make_data(samples)
    torch.manual_seed(2)  # for dropout
    loading: DataLoaderKwargs = {"shuffle": False}
    history = trainer.train(
        data, eval_data, num_epochs=EPOCHS, per_device_batch_size=BATCH, train_dataloader_kwargs=loading
    )
    with trainer.averaged_weights() if isinstance(trainer, EMAMixin) else nullcontext():
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return Outcome(losses, [record.values() for record in history], weights)


def load_script(source: str, folder: Path) -> Any:
    """Import a script, with what the user has to write."""
    path = folder / "script.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, script=script):
        spec.loader.exec_module(script)
    vars(script).update(NUM_EPOCHS=EPOCHS, make_metrics=make_metrics, make_train_metrics=make_metrics)
    return script


def run_script(script: Any, losses: list[float], samples: int = SAMPLES) -> Outcome:
    """Train with a script."""
    release_accelerator()
    net, parts = make_net(), make_data(samples)
    loaders = [DataLoader(part, BATCH, generator=torch.Generator()) for part in parts]
    torch.manual_seed(2)
    model, values = script.train(net, make_optimizer(net), *loaders)
    return Outcome(losses, values, model.state_dict())


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert expected.values
    assert found.losses == expected.losses
    for values, record in zip(found.values, expected.values, strict=True):
        assert values.pop("grad_norm", 0.0) == pytest.approx(record.get("grad_norm", 0.0), rel=1e-6)
        assert values == {name: record[name] for name in values}
    assert found.weights.keys() == expected.weights.keys()
    assert [name for name, value in found.weights.items() if not torch.equal(value, expected.weights[name])] == []


def eject(trainer: TrainingLoop[Any, Any]) -> str:
    return make_script(make_target("tests:trainer", trainer))
