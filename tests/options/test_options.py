"""Options are read from the command line and from files, with the help, the defaults and the choices of the trainer."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ptacc import (
    AMPMixin,
    CheckpointMixin,
    EMAMixin,
    Epochs,
    FreezeMixin,
    GradAccumMixin,
    Items,
    LRSchedulerMixin,
    MetricsMixin,
    Minutes,
    Steps,
    Trainer,
)
from ptacc.errors import OptionError
from ptacc.options import options, parse_options
from ptacc.testing import tiny_data, tiny_parts


class MyTrainer(AMPMixin, GradAccumMixin, EMAMixin, CheckpointMixin, MetricsMixin, Trainer):
    """A trainer of the script.

    Options:
        smoothing: How much to smooth
            the targets.
    """

    ema_decay: float = 0.99
    smoothing: float = 0.1
    kind: Literal["small", "large"] = "small"
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Script:
    lr: float = 0.1


def parse(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    parsed = parse_options(MyTrainer, arguments=["--checkpoint-dir", "runs/x", *arguments])
    return parsed.of_trainer(), parsed.of_train()


def test_what_is_not_given_is_left_to_the_trainer() -> None:
    assert parse() == ({"checkpoint_dir": "runs/x"}, {"num_epochs": None, "max_steps": None})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mixed-precision", "bf16"], {"mixed_precision": "bf16"}),
        (["--checkpoint-every", "500steps"], {"checkpoint_every": Steps(500)}),
        (["--checkpoint-every", "1epoch"], {}),  # the default
        (["--checkpoint-every", "2 epochs"], {"checkpoint_every": Epochs(2)}),
        (["--log-every", "0.5minutes"], {"log_every": Minutes(0.5)}),
        (["--log-every", "none"], {"log_every": None}),
        (["--log-every", "1_000_000items"], {"log_every": Items(1_000_000)}),
        (["--no-ema-evaluates"], {"ema_evaluates": False}),
        (["--resume", "True"], {"resume": True}),
        (["--resume", "runs/y"], {"resume": "runs/y"}),
        (["--resume-ignore", "stop", "precision"], {"resume_ignore": ("stop", "precision")}),
        (["--sizes", "3", "4", "5"], {"sizes": (3, 4, 5)}),
        (["--kind", "large", "--smoothing", "0"], {"kind": "large", "smoothing": 0.0}),
    ],
)
def test_options_of_the_trainer_are_read(arguments: list[str], expected: dict[str, Any]) -> None:
    assert parse(*arguments)[0] == {"checkpoint_dir": "runs/x", **expected}


def test_arguments_of_train_are_read() -> None:
    length, size = ["--num-epochs", "3", "--max-time", "9", "--max-items", "1e6"], ["--per-device-batch-size", "4"]
    given = parse(*length, *size, "--evaluate-every", "5steps")[1]
    assert given == {
        "num_epochs": 3,
        "max_steps": None,
        "per_device_batch_size": 4,
        "evaluate_every": Steps(5),
        "max_time": 9.0,
        "max_items": 1e6,
    }


def test_a_trainer_is_made_and_run_with_what_was_read(tmp_path: Path) -> None:
    given = parse_options(MyTrainer, arguments=["--checkpoint-dir", str(tmp_path), "--num-epochs", "2"])
    trainer = MyTrainer(**{**tiny_parts(), "default_callbacks": ()}, **given.of_trainer())
    assert len(trainer.train(tiny_data(), **given.of_train())) == 2


def test_a_script_has_options_of_its_own() -> None:
    given, own = parse_options(MyTrainer, Script, arguments=["--checkpoint-dir", "runs/x", "--lr", "0.5"])
    assert own == Script(lr=0.5)
    assert "lr" not in given.of_trainer()


# ---- help


def test_help_has_the_text_the_default_and_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--smoothing FLOAT How much to smooth the targets. (default: 0.1)" in text
    assert "--kind {small,large}" in text
    assert "--checkpoint-every 500steps|2epochs|10minutes|1000items|none `Epochs(1)`, `Steps(500)`" in text
    assert "--num-epochs {None}|INT Largest number of passes over the data." in text
    assert "(required)" in text


def test_every_option_of_the_mixins_has_a_help_text() -> None:
    class Large(FreezeMixin, LRSchedulerMixin, MyTrainer): ...

    made = dataclasses.fields(options(Large))
    assert [option.name for option in made if not option.metadata["help"]] == ["kind", "sizes"]
    assert {"metrics", "optimizer", "model", "create_scheduler", "unfreeze_at"}.isdisjoint(o.name for o in made)


def test_the_annotations_of_a_constructor_can_be_evaluated() -> None:
    assert typing.get_type_hints(MyTrainer.__init__)["smoothing"] is float


# ---- files


YAML = """
mixed-precision: bf16
num_epochs: 2
ema_evaluates: false
sizes: [7]
checkpoint_every: 5steps
"""
TOML = """
mixed_precision = "bf16"
num-epochs = 2
ema-evaluates = false
sizes = [7]
checkpoint_every = "5steps"
"""


@pytest.mark.parametrize(("name", "text"), [("run.yaml", YAML), ("run.toml", TOML)])
def test_a_file_is_read_and_the_command_line_replaces_it(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    trainer, train = parse("--config", str(tmp_path / name), "--mixed-precision", "no")
    assert trainer == {
        "checkpoint_dir": "runs/x",
        "mixed_precision": "no",
        "ema_evaluates": False,
        "sizes": (7,),
        "checkpoint_every": Steps(5),
    }
    assert train["num_epochs"] == 2


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert parse(f"--config={tmp_path / 'run.yaml'}")[0] == {"checkpoint_dir": "runs/x"}


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixed-precisoin", "bf16"], "Perhaps you meant: --mixed-precision"),
        (["--mixed-precision", "bf8"], "invalid choice"),
        (["--checkpoint-every", "5"], "'5' is not a cadence: write 500steps, 2epochs, 10minutes, 1000items or none"),
        (["--checkpoint-every", "0steps"], "must be an integer of at least 1"),
        (["--num-epochs", "two"], "two"),
    ],
)
def test_a_wrong_argument_ends_with_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").replace("─", " ").split())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "mixed_precisoin: bf16", "no option 'mixed_precisoin'. Did you mean `mixed_precision`"),
        ("run.yaml", "- bf16", "must map names of options to values"),
        ("run.ini", "", "must end in .yaml, .yml or .toml"),
    ],
)
def test_a_wrong_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        parse("--config", str(tmp_path / name))


def test_a_file_is_needed() -> None:
    with pytest.raises(OptionError, match="give a YAML or TOML file"):
        parse("--config")
