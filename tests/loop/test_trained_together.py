"""Freezing, losses with parameters, optimizers with modes and closures, and partial checkpoints, used together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, Adam, Optimizer
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import CheckpointMixin, ClosureMixin, Epochs, FreezeMixin, SeedMixin, Steps, Trainer
from ptacc.checkpoint.parts import read_full_parts
from ptacc.errors import CheckpointError
from ptacc.storage.remote_store import open_store

EPOCH = 3


class Centres(nn.Module):
    """Compares embeddings with a learned centre for each class, and counts its calls in training."""

    calls: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(classes, 5))
        self.register_buffer("calls", torch.zeros(()))

    @override
    def forward(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        self.calls += self.training
        return functional.cross_entropy(embeddings @ self.centres.T, targets)


class Saving(FreezeMixin, CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 0


class ByClosure(ClosureMixin, Saving): ...


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    return Adam(parameters, lr=0.02)


def make(
    directory: Path, optimizer: Any = adam, kind: type[Saving] = Saving, classes: int = 3, **options: Any
) -> Saving:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
    loss = Centres(classes).double()
    given: dict[str, Any] = {"checkpoint_every": Steps(1), "checkpoint_dir": directory, "default_callbacks": ()}
    return kind(
        model, loss_func=loss, optimizer=optimizer([*model.parameters(), *loss.parameters()]), **(given | options)
    )


def train(trainer: Saving, steps: int = 3 * EPOCH, batch_size: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(24, 4).double(), torch.arange(24) % 3)
    trainer.train(data, max_steps=steps, per_device_batch_size=batch_size)
    return state_of(trainer)


def state_of(trainer: Saving) -> dict[str, Tensor]:
    assert isinstance(trainer.loss_func, Centres)
    state = {**trainer.model.state_dict(), **trainer.loss_func.state_dict()}
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


OPTIONS: dict[str, dict[str, Any]] = {
    "unfreezing": {"unfreeze_at": {"0": Epochs(1), "1": Epochs(2)}},
    "what is trained alone": {"frozen": ["0", "1"], "checkpoint_frozen": False},
    "unfreezing, what is trained alone": {"unfreeze_at": {"0": Epochs(1), "1": Epochs(2)}, "checkpoint_frozen": False},
    "modes": {"optimizer": lambda parameters: AdamWScheduleFree(parameters, lr=0.02)},
    "modes, unfreezing": {
        "optimizer": lambda parameters: AdamWScheduleFree(parameters, lr=0.02),
        "unfreeze_at": {"0": Epochs(1)},
    },
    "a closure": {"optimizer": lambda parameters: LBFGS(parameters, lr=0.1, max_iter=3), "kind": ByClosure},
}


@pytest.mark.parametrize("step", range(1, 3 * EPOCH))
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_a_trained_loss_resumes_to_the_last_bit(name: str, step: int, tmp_path: Path) -> None:
    expected = train(make(tmp_path / "whole", **OPTIONS[name]))
    train(make(tmp_path / "run", **OPTIONS[name]), step)
    assert equal(train(make(tmp_path / "run", resume=True, **OPTIONS[name])), expected)


def test_parameters_that_are_unfrozen_later_are_in_every_checkpoint(tmp_path: Path) -> None:
    train(make(tmp_path, **OPTIONS["unfreezing, what is trained alone"]), 1)
    store = open_store(tmp_path)
    assert "0.weight" in read_full_parts(store, store.manifests()[-1])["model"]


def test_buffers_of_a_loss_count_a_step_once_however_often_its_closure_is_called(tmp_path: Path) -> None:
    assert train(make(tmp_path, **OPTIONS["a closure"]), 4)["calls"] == 4


def test_a_loss_with_other_classes_keeps_its_centres(tmp_path: Path) -> None:
    saved = train(make(tmp_path / "saved"))
    other = make(tmp_path / "other", classes=7)
    own = state_of(other)
    with pytest.raises(CheckpointError, match=r"ignore=\['options.loss_func.centres'\]"):
        other.load_checkpoint(tmp_path / "saved")
    assert equal(state_of(other), own)
    other.load_checkpoint(tmp_path / "saved", ignore={"options.loss_func.*"})
    loaded = state_of(other)
    assert torch.equal(loaded["centres"], own["centres"])
    assert torch.equal(loaded["0.weight"], saved["0.weight"])
