"""Checkpoints without frozen tensors: what they hold, how they resume, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, EMAMixin, FSDPMixin, SeedMixin, Steps, SWAMixin, Trainer, TrainerCore
from ptacc.checkpoint.frozen import FROZEN
from ptacc.checkpoint.parts import Snapshot, read_full_parts
from ptacc.cli import main
from ptacc.errors import CheckpointError
from ptacc.storage.remote_store import open_store
from ptacc.testing import tiny_data
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*no weights were averaged")  # by runs that are to be resumed


class Adapted(nn.Module):
    """A frozen layer with an adapter of rank 1, a batch norm and a table that is constant."""

    def __init__(self, width: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.left, self.right = nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.table: Tensor
        self.register_buffer("table", torch.ones(width))
        self.double()

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.norm(inputs)
        outputs: Tensor = self.base(inputs) + self.right(self.left(inputs)) * self.table[0]
        return outputs


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5
    checkpoint_frozen: bool = False


class Smoothed(EMAMixin, Saving):
    ema_decay: float = 0.9


class Averaging(SWAMixin, Smoothed):
    swa_start: int | None = 1


class Sharded(FSDPMixin, Averaging): ...


def make(directory: Path, kind: type[Saving] = Saving, model: nn.Module | None = None, **options: Any) -> Saving:
    model = Adapted() if model is None else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given: dict[str, Any] = {"optimizer": torch.optim.Adam(trained, lr=0.1), "checkpoint_every": Steps(1), **options}
    given = {"loss_func": nn.CrossEntropyLoss(), "default_callbacks": (), "checkpoint_dir": directory, **given}
    return kind(model, **given)


def train(trainer: Saving, **options: Any) -> dict[str, Tensor]:
    """Train two epochs of three steps, or what is left of them."""
    size = 8 // trainer.distributed.world_size
    given: dict[str, Any] = {"num_epochs": 2, "per_device_batch_size": size, **options}
    trainer.train(tiny_data(24), **given)
    return {name: tensor.clone() for name, tensor in trainer.unwrapped_model.state_dict().items()}


def read(directory: Path) -> Snapshot:
    store = open_store(directory)
    return read_full_parts(store, store.manifests()[-1])


def equal(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def test_a_checkpoint_holds_what_is_trained_and_buffers_that_change(tmp_path: Path) -> None:
    train(make(tmp_path))
    parts = read(tmp_path)
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert parts["model"].keys() == {"left.weight", "right.weight"} | statistics
    assert parts[FROZEN]["model"].keys() == {f"base.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")} | {
        "table"
    }


@pytest.mark.parametrize("kind", [Saving, Averaging])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_run_resumes_to_the_last_bit_with_the_frozen_weights_of_its_model(
    tmp_path: Path, kind: type[Saving], step: int
) -> None:
    whole = make(tmp_path / "whole", kind)
    expected = train(whole)
    train(make(tmp_path / "run", kind), max_steps=step)
    resumed = make(tmp_path / "run", kind, resume=True)
    assert equal(train(resumed), expected)
    for name, averages in whole.run.averages().items():
        assert equal(dict(resumed.run.averages()[name].tensors), dict(averages.tensors))


def test_averages_of_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    train(make(tmp_path, Averaging))
    for part in ("ema", "swa"):
        names = {"left.weight", "right.weight", "norm.running_mean", "norm.running_var"}
        assert read(tmp_path)[part]["averages"].keys() == names


@pytest.mark.parametrize("kind", [Averaging, Sharded])
def test_several_processes_resume_with_the_frozen_weights_of_their_model(tmp_path: Path, kind: type[Saving]) -> None:
    def go(directory: str, **options: Any) -> dict[str, Tensor]:
        return train(make(tmp_path / directory, kind, resume=True), **options)

    whole = run_ranks(lambda: go("whole"), 2)
    run_ranks(lambda: go("run", max_steps=2), 2)
    assert "base.0.weight" not in read(tmp_path / "run")["model"]
    assert all(equal(mine, its) for mine, its in zip(run_ranks(lambda: go("run"), 2), whole, strict=True))


def test_other_frozen_weights_are_refused_by_name_and_can_be_ignored(tmp_path: Path) -> None:
    train(make(tmp_path), max_steps=2)
    other = Adapted()
    with torch.no_grad():
        other.get_parameter("base.2.bias")[0] += 1e-12
    with pytest.raises(CheckpointError, match=r"(?s)the model's frozen base.2.bias.* had other values(?!.*base.0)"):
        train(make(tmp_path, model=other, resume=True))
    ended = train(make(tmp_path, model=other, resume=True, resume_ignore={"model.base.2.bias"}))
    assert torch.equal(ended["base.2.bias"], other.get_parameter("base.2.bias"))


class ChangeFrozen(Callback[TrainerCore]):
    """Changes frozen weights in a way that torch does not count as a change, as momentum encoders do."""

    @override
    def on_step_end(self, trainer: TrainerCore, step: object) -> None:
        trainer.unwrapped_model.get_parameter("base.0.bias").data.add_(1.0)


def test_frozen_weights_that_a_callback_changes_are_saved(tmp_path: Path) -> None:
    expected = train(make(tmp_path / "whole", callbacks=[ChangeFrozen()]))
    train(make(tmp_path / "run", callbacks=[ChangeFrozen()]), max_steps=2)
    assert "base.0.bias" in read(tmp_path / "run")["model"]
    assert equal(train(make(tmp_path / "run", callbacks=[ChangeFrozen()], resume=True)), expected)
    assert "base.0.bias" in read(tmp_path / "run")["model"]


def test_a_parameter_of_an_optimizer_is_saved_although_it_is_frozen(tmp_path: Path) -> None:
    model = Adapted()
    train(make(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))
    assert "base.0.weight" in read(tmp_path)["model"]


def test_a_frozen_teacher_among_the_options_is_left_out(tmp_path: Path) -> None:
    class Distilling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(4, 2).requires_grad_(False)

        @override
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs, targets)

    train(make(tmp_path, loss_func=(loss := Distilling())), max_steps=2)
    assert read(tmp_path)["options"] == {"loss_func": {}}
    train(make(tmp_path, loss_func=loss, resume=True), max_steps=3)
    with pytest.raises(CheckpointError, match=r"the options.loss_func's frozen teacher.bias"):
        train(make(tmp_path, loss_func=Distilling(), resume=True))


def test_a_checkpoint_with_all_weights_resumes_without_them_and_the_other_way_round(tmp_path: Path) -> None:
    expected = train(make(tmp_path / "whole"))
    for number, first in enumerate((False, True)):
        directory = tmp_path / f"{number}"
        train(make(directory, checkpoint_frozen=first), max_steps=2)
        assert equal(train(make(directory, checkpoint_frozen=not first, resume=True)), expected)


def test_the_size_of_a_checkpoint_is_that_of_the_adapter(tmp_path: Path) -> None:
    sizes = []
    for kept in (False, True):
        train(make(tmp_path / f"{kept}", model=Adapted(20_000), checkpoint_frozen=kept), max_steps=1)
        sizes.append(sum(file.size for file in open_store(tmp_path / f"{kept}").manifests()[-1].files.values()))
    assert sizes[0] < 20_000
    assert sizes[1] > 20_000 * 7 * 8


# ---- loading and exporting


@pytest.mark.parametrize("kind", [Saving, Smoothed])
def test_an_adapter_is_loaded_into_a_model_with_the_frozen_weights(tmp_path: Path, kind: type[Saving]) -> None:
    expected = train(saved := make(tmp_path / "run", kind))
    fresh = make(tmp_path / "other", kind)
    fresh.load_checkpoint(tmp_path / "run")
    assert equal(dict(fresh.model.state_dict()), expected)
    assert fresh.evaluate(tiny_data(8)).loss == saved.evaluate(tiny_data(8)).loss
    nn.init.ones_(fresh.model.get_parameter("base.0.bias"))
    with pytest.raises(CheckpointError, match=r"(?s)the model's frozen base.0.bias.*ignore=\['model.base.0.bias'\]"):
        fresh.load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("averages", [None, "ema"])
def test_an_export_of_what_is_trained_is_the_adapter(tmp_path: Path, averages: str | None) -> None:
    trainer = make(tmp_path / "run", Averaging)
    train(trainer)
    trainer.export_model(tmp_path / "adapter", averages=averages, trainable_only=True)
    trainer.export_model(tmp_path / "all", averages=averages)
    adapter, everything = load_file(tmp_path / "adapter"), load_file(tmp_path / "all")
    assert equal(adapter, {name: everything[name] for name in ("left.weight", "right.weight")})


@pytest.mark.parametrize("kind", [Averaging, Sharded])
def test_several_processes_export_one_adapter(tmp_path: Path, kind: type[Saving]) -> None:
    class Exporting(Callback[Saving]):
        @override
        def on_epoch_end(self, trainer: Saving, record: object) -> None:
            trainer.export_model(tmp_path / "adapter", averages="ema", trainable_only=True, overwrite=True)

    run_ranks(lambda: train(make(tmp_path / "run", kind, callbacks=[Exporting()])), 2)
    assert load_file(tmp_path / "adapter").keys() == {"left.weight", "right.weight"}


def test_an_export_without_trained_parameters_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    trainer.unwrapped_model.requires_grad_(requires_grad=False)
    with pytest.raises(CheckpointError, match=r"trainable_only=True\): all parameters are frozen"):
        trainer.export_model(tmp_path / "adapter", trainable_only=True)


def test_an_export_of_such_a_checkpoint_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(tmp_path / "run"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "weights")]) == 0
    assert capsys.readouterr().out.rstrip().endswith(", without 5 frozen tensors that the checkpoint leaves out")
