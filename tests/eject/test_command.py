"""`ptacc eject` finds trainers by name, and writes scripts that run."""

import sys
from pathlib import Path

import pytest
import torch

from ptacc.cli import main
from tests.eject.compositions import RecordedLoss, eject, load_script, make_data, make_net, make_trainer

MODULE = """
from ptacc import GradClipMixin, Trainer


class Clipped(GradClipMixin, Trainer):
    max_grad_norm: float | None = 2.0


def needs(argument): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "clipping", raising=False)
    (tmp_path / "clipping.py").write_text(MODULE)
    return tmp_path


def test_a_script_is_written_to_a_file_that_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eject", "clipping:Clipped", "-o", "plain.py"]
    assert main(command) == 0
    source = (folder / "plain.py").read_text()
    assert "# GradClipMixin\nMAX_GRAD_NORM = 2.0\n" in source
    assert main(command) == 2
    assert capsys.readouterr().err == "ptacc: plain.py exists. Give --force to overwrite it.\n"
    assert main([*command, "--force"]) == 0


def test_without_a_file_a_script_is_written_to_the_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eject", "clipping:Clipped"]) == 0
    assert capsys.readouterr().out.endswith('if __name__ == "__main__":\n    main()\n')


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clipping", "'clipping' is not the name of a trainer: it must be module:attribute"),
        ("clippings:Clipped", "There is no module 'clippings'"),
        ("clipping:Cliped", "The module clipping has no 'Cliped'. Did you mean `Clipped`?"),
        ("clipping:needs", "which is not a trainer. Give a class of trainers, a trainer, or a function"),
    ],
)
def test_a_name_of_something_else_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main(["eject", name]) == 2
    assert message in capsys.readouterr().err


def test_a_script_runs_and_saves_the_weights(folder: Path) -> None:
    script = load_script(eject(make_trainer(("scheduled",), RecordedLoss())), folder)
    script.loss_func, script.make_model, script.make_datasets = RecordedLoss(), make_net, lambda: make_data(44)
    script.main()
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert weights.keys() == make_net().state_dict().keys()
