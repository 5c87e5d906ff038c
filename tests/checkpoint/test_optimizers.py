"""The state of an optimizer belongs to parameters by their names, whatever their order in the model and in groups."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from typing_extensions import override

from ptacc import CheckpointMixin, LRSchedulerMixin, RunPlan, SeedMixin, Steps, Trainer
from ptacc.errors import CheckpointError, SchedulerError
from ptacc.protocols import SchedulerFactory
from ptacc.testing import tiny_data

Groups = Sequence[Sequence[str]]
ONE_GROUP: Groups = [["first", "second", "head"]]
TWO_GROUPS: Groups = [["first", "second"], ["head"]]
REFUSED = r"of the checkpoint holds head\.weight, head\.bias, and no group"


class Net(nn.Module):
    """Three layers, two of them of the same shape, registered in a given order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 2 if name == "head" else 4).double() for name in ("first", "second", "head")}
        for name in order.split():
            self.add_module(name, layers[name])

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule("head")(self.get_submodule("second")(self.get_submodule("first")(inputs)))
        return logits


class Saving(CheckpointMixin, LRSchedulerMixin, SeedMixin, Trainer):
    seed: int | None = 5
    create_scheduler: SchedulerFactory = lambda optimizer, plan: CosineAnnealingLR(optimizer, plan.total_steps)


def make(directory: Path, order: str = "first second head", groups: Groups = ONE_GROUP, **options: Any) -> Saving:
    """Make a trainer whose optimizer has the parameters of layers in groups, each with a learning rate of its own."""
    model = Net(order)
    settings = [
        {
            "params": [p for name, p in model.named_parameters() if name.partition(".")[0] in group],
            "lr": 0.02 * len(group),
        }
        for group in groups
    ]
    parts: dict[str, Any] = {"loss_func": nn.CrossEntropyLoss(), "default_callbacks": (), **options}
    parts = {"model": model, "optimizer": torch.optim.Adam(settings), **parts}
    return Saving(checkpoint_dir=directory, **parts)


def end(trainer: Saving, **limits: Any) -> dict[str, Tensor]:
    """Train two epochs of three steps, and return the weights by name."""
    trainer.train(tiny_data(24), num_epochs=2, **limits)
    return dict(sorted(trainer.model.state_dict().items()))


@pytest.mark.parametrize(
    ("order", "groups"),
    [
        ("second head first", ONE_GROUP),
        ("first second head", TWO_GROUPS[::-1]),
        ("second head first", TWO_GROUPS[::-1]),
    ],
)
def test_a_run_resumes_with_parameters_and_groups_in_another_order(tmp_path: Path, order: str, groups: Groups) -> None:
    before = ONE_GROUP if len(groups) == 1 else TWO_GROUPS
    whole = end(make(tmp_path / "whole", groups=before, checkpoint_every=Steps(4)))
    resumed = end(make(tmp_path / "resumed", order, groups, resume=tmp_path / "whole" / "step-00000004"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_tied_weight_is_the_same_under_all_of_its_names(tmp_path: Path) -> None:
    def tied(order: str, **options: Any) -> Saving:
        trainer = make(tmp_path, order, **options)
        trainer.model.get_submodule("second").weight = trainer.model.get_submodule("first").weight
        trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.02)
        return trainer

    end(first := tied("first second head"), max_steps=4)
    again = tied("head second first")
    again.load_checkpoint(tmp_path)
    saved, loaded = (trainer.optimizer.state[trainer.model.get_parameter("first.weight")] for trainer in (first, again))
    assert torch.equal(saved["exp_avg"], loaded["exp_avg"])


@pytest.mark.parametrize("groups", [ONE_GROUP, [["first", "head"], ["second"]], [["first", "second"]]])
def test_groups_that_hold_other_parameters_are_refused_by_name(tmp_path: Path, groups: Groups) -> None:
    end(make(tmp_path, groups=TWO_GROUPS), max_steps=4)
    trainer = make(tmp_path, groups=groups, resume=True)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    for module in trainer.model.children():
        module.requires_grad_(any(module is trainer.model.get_submodule(name) for group in groups for name in group))
    with pytest.raises(CheckpointError, match=REFUSED):
        end(trainer)
    with pytest.raises(CheckpointError, match=REFUSED):
        trainer.load_checkpoint(tmp_path)
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())


def test_a_run_can_resume_without_the_state_of_other_groups(tmp_path: Path) -> None:
    end(make(tmp_path, groups=TWO_GROUPS), max_steps=4)
    trainer = make(tmp_path, resume=True, resume_ignore={"optimizer"})
    end(trainer)
    assert float(trainer.optimizer.state[trainer.model.get_parameter("head.weight")]["step"]) == 2


class Counting(SGD):
    """Has a state besides that of its parameters."""

    count = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "count"})
        self.count = state_dict["count"]


def test_what_a_class_adds_to_the_state_is_kept(tmp_path: Path) -> None:
    model = Net("first second head")
    saved, loaded = (make(tmp_path, optimizer=Counting(model.parameters(), lr=0.1), model=model) for _ in range(2))
    saved.optimizer.__dict__["count"] = 7
    end(saved)
    loaded.load_checkpoint(tmp_path)
    assert vars(loaded.optimizer)["count"] == 7


def test_a_scheduler_with_values_of_groups_in_another_order_is_refused(tmp_path: Path) -> None:
    def plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, min_lr=[0.01, 0.001])

    options: dict[str, Any] = {"create_scheduler": plateau, "scheduler_monitor": "train_loss"}
    end(make(tmp_path, groups=TWO_GROUPS, **options), max_steps=4)
    with pytest.raises(SchedulerError, match=r"Create the groups in the order first.bias, head.bias"):
        end(make(tmp_path, groups=TWO_GROUPS[::-1], resume=True, **options))
