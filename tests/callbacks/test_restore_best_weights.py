"""`RestoreBestWeights` can leave out frozen parameters, which have to stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, EMAMixin, FSDPMixin, RestoreBestWeights, SeedMixin, Trainer, TrainerCore
from ptacc.errors import ModelError
from ptacc.testing import tiny_data
from tests.ranks import run_ranks


class Training(CheckpointMixin, EMAMixin, SeedMixin, Trainer):
    seed: int | None = 1
    ema_decay: float = 0.5


class Sharded(FSDPMixin, Training): ...


class Unfreeze(Callback[TrainerCore]):
    """Trains the first layer from the second epoch on."""

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: object) -> None:
        layer = trainer.unwrapped_model.get_submodule("0").requires_grad_()
        if len(trainer.optimizer.param_groups) == 1:
            trainer.optimizer.add_param_group({"params": [*layer.parameters()]})


def train(directory: Path, best: RestoreBestWeights, kind: type[Training] = Training, **options: Any) -> Training:
    """Train three epochs, of which the first has the largest loss."""
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).requires_grad_(False)
    model = nn.Sequential(*frozen, nn.Linear(8, 2)).double()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    callbacks = [best, *options.pop("callbacks", ())]
    given: dict[str, Any] = {
        "optimizer": optimizer,
        "default_callbacks": (),
        "checkpoint_dir": directory,
        "resume": True,
    }
    trainer = kind(model, loss_func=nn.CrossEntropyLoss(), callbacks=callbacks, **given)
    size = 8 // trainer.distributed.world_size
    limits: dict[str, Any] = {"num_epochs": 3, "per_device_batch_size": size, **options}
    trainer.train(tiny_data(24), tiny_data(8), **limits)
    return trainer


def best_of(directory: Path, *, frozen: bool, **options: Any) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights after a run, and the names of the copied ones."""
    best = RestoreBestWeights("eval_loss", mode="max", frozen=frozen)
    trainer = train(directory, best, **options)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, {*best.best_weights}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", [Training, Sharded])
def test_the_same_weights_are_restored_from_a_copy_without_frozen_ones(
    tmp_path: Path, kind: type[Training], world_size: int
) -> None:
    def go(frozen: bool) -> tuple[dict[str, Tensor], set[str]]:
        return best_of(tmp_path / f"{frozen}", frozen=frozen, kind=kind)

    (expected, everything), *_ = run_ranks(go, world_size, True)
    (restored, copied), *_ = run_ranks(go, world_size, False)
    assert everything - copied == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(restored[name], expected[name]) for name in expected)


def test_a_resumed_run_restores_them_too(tmp_path: Path) -> None:
    expected, _ = best_of(tmp_path / "whole", frozen=False)
    best_of(tmp_path / "run", frozen=False, max_steps=7)
    restored, copied = best_of(tmp_path / "run", frozen=False)
    assert "0.weight" not in copied
    assert all(torch.equal(restored[name], expected[name]) for name in expected)


def test_frozen_parameters_that_change_after_the_copy_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"frozen=False\): 0.weight was frozen when .*Leave out frozen=False"):
        best_of(tmp_path, frozen=False, callbacks=[Unfreeze()])
