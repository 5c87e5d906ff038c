"""Models whose state has entries that are not tensors, or has a format with a version."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import CheckpointMixin, EMAMixin, RestoreBestWeights, SWAMixin, Trainer
from ptacc.errors import CheckpointError
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning.isolated import isolated_copy


class Counting(nn.Linear):
    """Counts its calls in training in its extra state, which it returns by reference. None before the first call."""

    seen: dict[str, Any] | None = None

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen or {"calls": 0, "last": input[0].clone(), "name": "Zoë"}
            self.seen["calls"] += 1
            self.seen["last"].copy_(input[0])
        return super().forward(input)

    @override
    def get_extra_state(self) -> Any:
        return self.seen

    @override
    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Transposed(nn.Linear):
    """In format 2 of its state, the weight is transposed: a state of format 1 is converted."""

    _version = 2

    @override
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].T
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class Averaged(CheckpointMixin, EMAMixin, SWAMixin, Trainer):
    ema_decay: float = 0.5


def parts(kind: type[nn.Linear] = Counting, features: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    model = kind(4, features, dtype=torch.float64)
    return {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def extra(state: Mapping[str, Any]) -> tuple[int, list[float]]:
    return state["_extra_state"]["calls"], state["_extra_state"]["last"].tolist()


def test_the_best_weights_hold_a_copy_of_extra_state() -> None:
    best = RestoreBestWeights("eval_loss", mode="max")
    trainer = Trainer(**parts(), callbacks=[best])
    trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    assert extra(best.best_weights)[0] == 3
    assert extra(trainer.model.state_dict()) == extra(best.best_weights)


@pytest.mark.parametrize("load", ["resume", "load_checkpoint"])
def test_extra_state_is_saved_and_loaded_whatever_its_type_before(tmp_path: Path, load: str) -> None:
    best = RestoreBestWeights("eval_loss", restore=False)
    first = Averaged(**parts(), checkpoint_dir=tmp_path, swa_start=None, callbacks=[best])
    first.train(tiny_data(), tiny_data(), num_epochs=2)
    again = Averaged(**parts(), checkpoint_dir=tmp_path, swa_start=None, resume=True, callbacks=[best])
    if load == "resume":
        again.train(tiny_data(), tiny_data(), num_epochs=2)
    else:
        again.load_checkpoint(tmp_path)
    assert extra(again.model.state_dict()) == extra(first.model.state_dict())
    assert again.evaluate(tiny_data()).loss == first.evaluate(tiny_data()).loss


def test_averages_leave_extra_state_to_the_model(tmp_path: Path) -> None:
    trainer = Averaged(**parts(), checkpoint_dir=tmp_path, swa_start=1)
    trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    assert extra(trainer.model.state_dict())[0] == 6
    with pytest.raises(CheckpointError, match="let its get_extra_state"):
        trainer.export_model(tmp_path / "model", averages="ema")


def test_an_isolated_copy_restores_extra_state() -> None:
    trainer = Trainer(**parts())
    trainer.train(tiny_data(), num_epochs=1)
    before = extra(trainer.model.state_dict())
    with isolated_copy(trainer) as copied:
        copied.train(tiny_data(), num_epochs=1)
    assert extra(trainer.model.state_dict()) == before


def test_a_model_with_extra_state_is_explained() -> None:
    trainer = Trainer(**parts())
    trainer.train(tiny_data(), num_epochs=1)
    assert "3 tensors, 112 B" in str(trainer.explain())


@pytest.mark.parametrize("load", ["resume", "load_checkpoint"])
def test_a_state_is_loaded_in_the_format_in_which_it_was_saved(tmp_path: Path, load: str) -> None:
    class Saved(CheckpointMixin, Trainer): ...

    first = Saved(**parts(Transposed, features=4), checkpoint_dir=tmp_path)
    first.train(tiny_data(), num_epochs=2)
    again = Saved(**parts(Transposed, features=4), checkpoint_dir=tmp_path, resume=True)
    if load == "resume":
        again.train(tiny_data(), num_epochs=2)
    else:
        again.load_checkpoint(tmp_path)
    assert torch.equal(again.model.get_parameter("weight"), first.model.get_parameter("weight"))


def test_the_best_weights_are_restored_in_the_format_in_which_they_were_copied() -> None:
    best = RestoreBestWeights("train_loss")
    trainer = Trainer(**parts(Transposed, features=4), callbacks=[best])
    trainer.train(tiny_data(), num_epochs=2)
    assert torch.equal(trainer.model.get_parameter("weight"), best.best_weights["weight"])
