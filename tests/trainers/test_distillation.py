"""Distillation: the teacher's mode, gradients and place in checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptacc import CheckpointMixin, Steps
from ptacc.checkpoint.parts import read_full_parts
from ptacc.errors import CheckpointError, LossError, OptionError
from ptacc.storage.remote_store import open_store
from ptacc.testing import tiny_data, tiny_parts
from ptacc.trainers import DistillationTrainer


class Distilling(CheckpointMixin, DistillationTrainer): ...


class Keeping(Distilling):
    teacher: nn.Module


def make_teacher(seed: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, classes)).double()


def train(kind: type[Distilling], folder: Path, teacher: nn.Module, steps: int = 2, **options: Any) -> Distilling:
    trainer = kind(
        **tiny_parts(), teacher=teacher, checkpoint_dir=folder, checkpoint_every=Steps(1), resume=True, **options
    )
    trainer.train(tiny_data(), max_steps=steps)
    return trainer


def test_the_teacher_is_in_eval_mode_and_has_no_gradients(tmp_path: Path) -> None:
    teacher = make_teacher()
    train(Distilling, tmp_path, teacher)
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def saved_options(folder: Path) -> set[str]:
    store = open_store(folder)
    return set(read_full_parts(store, store.manifests()[-1])["options"])


def test_checkpoints_hold_the_teacher_only_if_it_is_redeclared(tmp_path: Path) -> None:
    train(Distilling, tmp_path / "without", make_teacher())
    train(Keeping, tmp_path / "with", make_teacher())
    assert saved_options(tmp_path / "without") == set()
    assert saved_options(tmp_path / "with") == {"teacher"}


def test_a_run_resumes_with_the_same_teacher_only(tmp_path: Path) -> None:
    train(Distilling, tmp_path, make_teacher())
    assert train(Distilling, tmp_path, make_teacher(), steps=3).progress.steps == 3
    with pytest.raises(CheckpointError, match="teacher"):
        train(Distilling, tmp_path, make_teacher(seed=1), steps=4)


def test_evaluations_have_the_loss_of_the_targets(tmp_path: Path) -> None:
    parts, (inputs, targets) = tiny_parts(), tiny_data().tensors
    trainer = DistillationTrainer(**parts, teacher=make_teacher())
    expected = nn.functional.cross_entropy(parts["model"](inputs), targets).item()
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(expected)


def test_a_teacher_with_other_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"the shape \(8, 2\), and the teacher \(8, 3\)"):
        train(Distilling, tmp_path, make_teacher(classes=3))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"teacher_share": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        DistillationTrainer(**tiny_parts(), teacher=make_teacher(), **options)


def test_the_model_cannot_teach_itself() -> None:
    parts = tiny_parts()
    with pytest.raises(OptionError, match="another module than the model"):
        DistillationTrainer(**parts, teacher=parts["model"])
