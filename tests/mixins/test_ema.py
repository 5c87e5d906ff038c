import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EMAMixin,
    GradAccumMixin,
    RestoreBestWeights,
    StepResult,
    SWAMixin,
    Trainer,
)
from ptacc.checkpoint.export import exported_weights
from ptacc.checkpoint.parts import SHARED, Snapshot, read_parts
from ptacc.cli import main
from ptacc.errors import NestedRunError, NoRunError, OptionError
from ptacc.mixins.ema import EMA_STATE
from ptacc.model.averaging import AveragedWeights
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import find_learning_rate
from tests.ranks import run_ranks


class Averaged(GradAccumMixin, EMAMixin, Trainer): ...


def train(**options: Any) -> tuple[Averaged, list[dict[str, Tensor]]]:
    """Train, and return the weights before and after each step."""
    recorded: list[dict[str, Tensor]] = []

    class Watched(Averaged):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            recorded.append(copy.deepcopy(dict(self.unwrapped_model.state_dict())))

    trainer = Watched(**tiny_parts(), **options)
    recorded.append(copy.deepcopy(dict(trainer.model.state_dict())))
    trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    return trainer, recorded


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_is_updated_once_per_step(accumulation: int) -> None:
    trainer, recorded = train(ema_decay=0.9, gradient_accumulation_steps=accumulation)
    expected = recorded[0]["weight"]
    for weights in recorded[1:]:
        expected = 0.9 * expected + 0.1 * weights["weight"]
    torch.testing.assert_close(trainer.run[EMA_STATE].tensors["weight"], expected, rtol=1e-12, atol=0)
    assert trainer.run[EMA_STATE].updates == trainer.progress.steps


def test_evaluation_uses_the_average_and_training_does_not() -> None:
    trainer, recorded = train(ema_decay=0.9)
    assert torch.equal(trainer.model.state_dict()["weight"], recorded[-1]["weight"])
    with trainer.averaged_weights():
        averaged = float(
            nn.functional.cross_entropy(trainer.model(tiny_data().tensors[0]), tiny_data().tensors[1]).detach()
        )
    assert trainer.history[-1].eval_loss == pytest.approx(averaged, rel=1e-12)
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(averaged, rel=1e-12)
    assert torch.equal(trainer.model.state_dict()["weight"], recorded[-1]["weight"])


def test_with_ema_evaluates_false_evaluation_uses_the_weights() -> None:
    trainer, _ = train(ema_decay=0.9, ema_evaluates=False)
    plain = Trainer(**tiny_parts())
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate(tiny_data()).loss == plain.evaluate(tiny_data()).loss


def test_a_model_with_batch_norm_trains_with_averages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    data = TensorDataset(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in tiny_data().tensors))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Averaged(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, ema_decay=0.5, default_callbacks=())
    history = trainer.train(data, data, num_epochs=5)
    first, last = history[0].eval_loss, history[-1].eval_loss
    assert first is not None
    assert last is not None
    assert last < first


def test_an_evaluation_within_averaged_weights_uses_them() -> None:
    trainer, _ = train(ema_decay=0.9)
    expected = trainer.evaluate(tiny_data()).loss
    with trainer.averaged_weights():
        assert trainer.evaluate(tiny_data()).loss == expected
        with trainer.averaged_weights():
            pass
        assert trainer.evaluate(tiny_data()).loss == expected
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss != expected


def test_the_best_model_is_the_one_that_was_evaluated() -> None:
    trainer = Averaged(**tiny_parts(), ema_decay=0.5, callbacks=[RestoreBestWeights("eval_loss", mode="max")])
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    best = max(epoch.eval_loss for epoch in history if epoch.eval_loss is not None)
    assert best == history[0].eval_loss
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(best, rel=1e-12)
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(best, rel=1e-12)


def evaluate_after_a_run() -> tuple[float, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer = Averaged(**parts, ema_decay=0.5)
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=4)
    with trainer.averaged_weights():
        buffers = torch.cat([buffer.flatten() for buffer in model.buffers()]).tolist()
    return trainer.evaluate(tiny_data()).loss, buffers


def test_after_a_run_all_processes_have_the_same_averages_of_buffers() -> None:
    first, second = run_ranks(evaluate_after_a_run, 2, timeout=60)
    assert first == second


# ---- averages and the weights that they belong to


class Saving(CheckpointMixin, Trainer): ...


class Saved(CheckpointMixin, Averaged): ...


class SavedWithSWA(CheckpointMixin, SWAMixin, Trainer): ...


def make_saved(directory: Path, kind: type[Any] = Saved, **options: Any) -> Any:
    return kind(**tiny_parts(), checkpoint_dir=directory, **{"ema_decay": 0.5, **options})


def reported(directory: Path, name: str) -> float:
    return CheckpointStore(str(directory)).manifest(name).metrics["eval_loss"]


@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_loaded_checkpoint_evaluates_to_what_it_was_saved_with(
    tmp_path: Path, is_fresh: bool, weights_only: bool
) -> None:
    trainer = make_saved(tmp_path)
    trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    trainer = make_saved(tmp_path / "fresh") if is_fresh else trainer
    for name in ("step-00000003", "step-00000009", "step-00000006"):
        trainer.load_checkpoint(tmp_path / name, weights_only=weights_only)
        assert trainer.evaluate(tiny_data()).loss == reported(tmp_path, name)
        assert trainer.evaluate(tiny_data()).loss == reported(tmp_path, name)


def test_a_checkpoint_without_averages_drops_those_of_the_run(tmp_path: Path) -> None:
    Saving(**tiny_parts(), checkpoint_dir=tmp_path / "plain").train(tiny_data(), tiny_data(), num_epochs=1)
    trainer = make_saved(tmp_path / "averaged")
    trainer.train(tiny_data(), num_epochs=2)
    trainer.load_checkpoint(tmp_path / "plain")
    assert trainer.evaluate(tiny_data()).loss == reported(tmp_path / "plain", "step-00000003")
    with pytest.raises(NoRunError, match="no averages"), trainer.averaged_weights():
        pass


def test_a_run_after_loading_starts_new_averages(tmp_path: Path) -> None:
    make_saved(tmp_path).train(tiny_data(), num_epochs=2)
    trainer = make_saved(tmp_path / "again", ema_decay=0.0)
    trainer.load_checkpoint(tmp_path)
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=1)
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss == history[-1].eval_loss


@pytest.mark.parametrize(("kind", "part"), [(Saved, "ema"), (SavedWithSWA, "swa")])
def test_the_averages_of_a_loaded_checkpoint_are_exported(tmp_path: Path, kind: type[Any], part: str) -> None:
    options: dict[str, Any] = {"ema_decay": 0.5} if kind is Saved else {"swa_start": 1}
    trainer = kind(**tiny_parts(), checkpoint_dir=tmp_path, **options)
    trainer.train(tiny_data(), num_epochs=3)
    trainer.load_checkpoint(tmp_path / "step-00000006")
    trainer.export_model(tmp_path / "here", averages=part)
    main(["export", str(tmp_path / "step-00000006"), str(tmp_path / "expected"), "--averages", part])
    found, expected = load_file(tmp_path / "here"), load_file(tmp_path / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_loaded_by_hand_after_a_run_are_evaluated() -> None:
    trainer, _ = train(ema_decay=0.9)
    plain = Trainer(**tiny_parts())
    trainer.model.load_state_dict(plain.model.state_dict())
    with pytest.warns(UserWarning, match="the weights were changed after the averages 'ema'"):
        assert trainer.evaluate(tiny_data()).loss == plain.evaluate(tiny_data()).loss


def test_a_search_after_a_run_leaves_the_averages_in_use() -> None:
    trainer, _ = train(ema_decay=0.9)
    expected = trainer.evaluate(tiny_data()).loss
    find_learning_rate(trainer, tiny_data(), steps=10)
    assert trainer.evaluate(tiny_data()).loss == expected


def test_weights_are_not_changed_within_averaged_weights(tmp_path: Path) -> None:
    trainer = make_saved(tmp_path)
    trainer.train(tiny_data(), num_epochs=1)
    changes: dict[str, Callable[[], object]] = {
        "train": lambda: trainer.train(tiny_data(), num_epochs=1),
        "load_checkpoint": lambda: trainer.load_checkpoint(tmp_path),
    }
    for name, change in changes.items():
        with trainer.averaged_weights(), pytest.raises(NestedRunError, match=rf"{name}\(\) was called within"):
            change()


def test_averages_start_with_weights_that_a_callback_loads() -> None:
    class Loading(Callback[Averaged]):
        @override
        def on_run_start(self, trainer: Averaged) -> None:
            with torch.no_grad():
                trainer.unwrapped_model.get_parameter("weight").fill_(1.0)

    trainer = Averaged(**tiny_parts(), ema_decay=0.5, callbacks=[Loading()])
    history = trainer.train(tiny_data(8), tiny_data(), max_steps=1, evaluate_first=True)
    expected = 0.5 + 0.5 * trainer.model.state_dict()["weight"]
    torch.testing.assert_close(trainer.run[EMA_STATE].tensors["weight"], expected)
    trainer.model.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.zeros(2)})
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss == history.initial[""].loss


def test_averages_that_are_added_on_resuming_start_with_the_resumed_weights(tmp_path: Path) -> None:
    Saving(**tiny_parts(), checkpoint_dir=tmp_path).train(tiny_data(), num_epochs=1)
    options: Any = {"resume": True, "resume_ignore": {"ema"}, "ema_decay": 0.999}
    trainer = make_saved(tmp_path, **options)
    trainer.train(tiny_data(), max_steps=4)
    average, weight = trainer.run[EMA_STATE].tensors["weight"], trainer.model.state_dict()["weight"]
    store = CheckpointStore(str(tmp_path))
    saved = read_parts(store, store.manifest("step-00000003"), SHARED)["model"]["weight"]
    torch.testing.assert_close(average, 0.999 * saved + 0.001 * weight)


def test_the_averages_of_swa_are_the_weights_after_the_run(tmp_path: Path) -> None:
    class Both(CheckpointMixin, SWAMixin, EMAMixin, Trainer): ...

    trainer = Both(**tiny_parts(), checkpoint_dir=tmp_path, swa_start=1, ema_decay=0.5)
    trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    trainer.export_model(tmp_path / "swa", averages="swa")
    assert torch.equal(load_file(tmp_path / "swa")["weight"], trainer.model.state_dict()["weight"])
    found = trainer.evaluate(tiny_data()).loss
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss == found


def test_the_average_of_16_bit_weights_is_exported_with_their_dtype(tmp_path: Path) -> None:
    model = nn.Linear(4, 2).bfloat16()
    averages = AveragedWeights(model)
    averages.update(model, weight=0.5)
    exported = exported_weights(Snapshot({"model": model.state_dict(), "ema": averages.state_dict()}), "ema")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


@pytest.mark.parametrize("decay", [-0.1, 1, math.nan])
def test_a_decay_that_gives_no_average_is_refused(decay: float) -> None:
    with pytest.raises(OptionError, match=r"ema_decay=.*: must be at least 0 and less than 1"):
        Averaged(**tiny_parts(), ema_decay=decay)
