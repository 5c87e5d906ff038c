"""Which checkpoint of a directory is loaded or exported: the best by a value, or the newest with a label."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ptacc import Best, CheckpointMixin, Monitor, SaveBest, Trainer
from ptacc.cli import main
from ptacc.errors import CheckpointError, OptionError
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data, tiny_parts


class Saving(CheckpointMixin, Trainer): ...


def make(directory: Path, **options: Any) -> Saving:
    return Saving(**tiny_parts(), checkpoint_dir=directory, **options)


def train(directory: Path, **options: Any) -> dict[str, float]:
    """Train, and return the evaluated loss of each checkpoint by its name, oldest first."""
    torch.manual_seed(0)
    make(directory, **options).train(tiny_data(24), tiny_data(8), num_epochs=4)
    return {one.name: one.metrics["eval_loss"] for one in CheckpointStore(str(directory)).manifests()}


def weights(trainer: Saving) -> list[Tensor]:
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def loaded(directory: Path, **arguments: Any) -> list[Tensor]:
    trainer = make(directory)
    trainer.load_checkpoint(directory, **arguments)
    return weights(trainer)


def is_loaded(directory: Path, name: str, **arguments: Any) -> bool:
    expected = make(directory)
    expected.load_checkpoint(directory / name)
    return all(map(torch.equal, loaded(directory, **arguments), weights(expected)))


WORST = Best("eval_loss", mode="max")
"""As the tiny problem is learned, the first checkpoint has the highest loss."""


@pytest.mark.parametrize("which", [WORST, Monitor("eval_loss", mode="max")], ids=["Best", "Monitor"])
def test_the_best_checkpoint_by_a_given_value_is_loaded(tmp_path: Path, which: Best | Monitor) -> None:
    losses = train(tmp_path)
    worst = max(losses, key=losses.__getitem__)
    assert worst != max(losses)
    assert is_loaded(tmp_path, worst, which=which)
    assert is_loaded(tmp_path, max(losses), which="last")


def test_the_best_is_that_by_the_value_of_keep_best(tmp_path: Path) -> None:
    losses = train(tmp_path, keep_last=1, keep_best=WORST)
    trainer = make(tmp_path, keep_best=WORST)
    trainer.load_checkpoint(tmp_path, which="best")
    assert len(losses) == 2
    assert all(map(torch.equal, weights(trainer), loaded(tmp_path / min(losses))))


def test_without_keep_best_the_value_of_the_best_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the best by which value\? Give it: which=Best\('eval_loss'\), or set"):
        make(tmp_path).load_checkpoint(tmp_path, which="best")
    with pytest.raises(OptionError, match=r"which=3.*must be 'best', 'last', a label or a Best"):
        make(tmp_path).load_checkpoint(tmp_path, which=3)  # type: ignore[arg-type]


def test_the_newest_checkpoint_with_a_label_is_loaded(tmp_path: Path) -> None:
    losses = train(tmp_path, checkpoint_every=None, callbacks=[SaveBest("eval_loss", mode="max")])
    assert is_loaded(tmp_path, min(losses), which="eval_loss")
    assert not is_loaded(tmp_path, max(losses), which="eval_loss")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("mine", "no intact checkpoint with the label 'mine'. There are: none"),
        (
            Best("accuracy"),
            "no intact checkpoint with a value 'accuracy'. There are: eval_loss",
        ),
    ],
)
def test_a_label_or_value_that_no_checkpoint_has_is_named(tmp_path: Path, which: str | Best, message: str) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path).load_checkpoint(tmp_path, which=which)


def test_if_the_best_is_damaged_the_second_best_is_loaded_with_a_warning(tmp_path: Path) -> None:
    first, second, *_ = train(tmp_path)
    shutil.copy(tmp_path / second / "shared.json", tmp_path / first / "shared.json")
    with pytest.warns(UserWarning, match=f"{first} is skipped: damaged"):
        assert is_loaded(tmp_path, second, which=WORST)


# ---- the command line


def test_the_best_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = train(tmp_path / "run")
    out = str(tmp_path / "best")
    assert main(["export", str(tmp_path / "run"), out, "--best", "eval_loss", "--mode", "max"]) == 0
    assert f"the weights of {first}" in capsys.readouterr().out
    written = load_file(out)
    names = make(tmp_path).model.state_dict()
    assert all(map(torch.equal, [written[name] for name in names], loaded(tmp_path / "run" / first)))


def test_the_best_checkpoint_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = train(tmp_path)
    assert main(["checkpoints", str(tmp_path), "--best", "eval_loss"]) == 0
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "best, manifest intact" in line]
    assert marked == [min(losses, key=losses.__getitem__)]
    main(["checkpoints", str(tmp_path), "--best", "eval_loss", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out) if row["best"]] == marked


@pytest.mark.parametrize("command", [["checkpoints"], ["export", "out"]])
def test_a_value_that_no_checkpoint_has_is_reported(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert main([command[0], str(tmp_path), *map(str, map(tmp_path.joinpath, command[1:])), "--best", "acc"]) == 2
    assert "no intact checkpoint with a value 'acc'. There are: eval_loss" in capsys.readouterr().err
