"""The examples, run as a reader runs them: by Python, by `accelerate launch` and by `torchrun`, on the CPU."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Sampler
from typing_extensions import override

from examples import digits_plain
from ptacc.rng import permutation
from tests.ranks import find_free_port, launch

EXAMPLES = Path(digits_plain.__file__).parent
SCRIPTS = Path(sys.executable).parent
RELATIVE = 1e-10
"""What float64 holds over 80 steps, with room: on one machine, the forms were 1e-15 apart."""


@dataclass(frozen=True)
class Form:
    """One way to run the example, with its part of the global batch of 32."""

    launcher: tuple[str, ...] = (sys.executable,)
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


ALONE = Form()
ACCUMULATED = Form(options=("--per-device-batch-size", "16", "--accumulate", "2"))
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
HALF = ("--per-device-batch-size", "16")
SETTINGS = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
ACCELERATE = (str(SCRIPTS / "accelerate"), "launch", *SETTINGS, "--num_cpu_threads_per_process", "1")
ACCELERATE_1 = Form((*ACCELERATE, "--cpu", "--num_processes", "1"))
ACCELERATE_2 = Form((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), HALF, ON_CPU)
TORCHRUN_2 = Form((str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2"), HALF, ON_CPU)


@dataclass(frozen=True)
class Outcome:
    output: str
    steps: list[dict[str, float]]
    epochs: list[dict[str, float]]
    picture: bytes

    @property
    def accuracy(self) -> float:
        return accuracy_in(self.output)


def accuracy_in(output: str) -> float:
    (percent,) = re.findall(r"accuracy (.*)% of 360 digits", output)
    return float(percent) / 100


def run(form: Form, folder: Path, *options: str) -> Outcome:
    """Run the example, and see to it that it ends well, without a warning."""
    history, picture = folder / "history.jsonl", folder / "digits.png"
    launcher = list(form.launcher)
    if "--multi_gpu" in launcher:
        launcher += ["--main_process_port", str(find_free_port())]
    command = [*launcher, str(EXAMPLES / "digits.py"), *form.options, *options]
    files = ["--history", str(history), "--out", str(picture)]
    ended = launch([*command, *files], env={"PYTHONWARNINGS": "error", **form.environment}, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    records = [json.loads(line) for line in history.read_text().splitlines()]
    return Outcome(
        ended.stdout,
        [numbers_in(record) for record in records if record["kind"] == "step"],
        [numbers_in(record) for record in records if record["kind"] == "epoch"],
        picture.read_bytes(),
    )


def numbers_in(record: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a record, those of its parts by `part/name`, without the seconds."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in numbers_in(value).items()}
        elif isinstance(value, int | float) and name != "seconds":
            numbers[name] = value
    return numbers


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, two epochs, in float64."""
    return run(ALONE, tmp_path_factory.mktemp("double"), "--double", "--epochs", "2")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One process, as the example is by default."""
    return run(ALONE, tmp_path_factory.mktemp("full"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(ACCUMULATED, id="accumulated"),
        pytest.param(ACCELERATE_1, id="accelerate launch, 1 process"),
        pytest.param(ACCELERATE_2, id="accelerate launch, 2 processes"),
        pytest.param(TORCHRUN_2, id="torchrun, 2 processes"),
    ],
)
def test_every_form_trains_alike_in_float64(form: Form, double: Outcome, tmp_path: Path) -> None:
    other = run(form, tmp_path, "--double", "--epochs", "2")
    assert len(other.steps) == 80
    assert {"loss", "learning_rate", "items", "logged/grad_norm"} <= other.steps[0].keys()
    for ours, theirs in zip(double.steps + double.epochs, other.steps + other.epochs, strict=True):
        assert theirs == pytest.approx(ours, rel=RELATIVE, abs=0)
    assert other.accuracy == double.accuracy
    assert other.output.count("\n") == double.output.count("\n")  # rank 0 alone prints


@pytest.mark.timeout(120)
def test_two_processes_train_alike_in_float32(full: Outcome, tmp_path: Path) -> None:
    other = run(TORCHRUN_2, tmp_path)
    for ours, theirs in zip(full.steps[:20], other.steps[:20], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert abs(other.accuracy - full.accuracy) * 360 < 2.1


@pytest.mark.timeout(120)
def test_reaches_98_percent(full: Outcome) -> None:
    assert full.accuracy >= 0.98
    assert len(full.epochs) == 12
    assert full.epochs[-1]["train_loss"] < full.epochs[0]["train_loss"]


@pytest.mark.timeout(120)
def test_draws_a_png(full: Outcome) -> None:
    assert full.picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert full.picture.rstrip().endswith(b"IEND\xaeB`\x82")


@pytest.mark.timeout(120)
def test_bf16_changes_the_losses_and_trains(full: Outcome, tmp_path: Path) -> None:
    other = run(ALONE, tmp_path, "--mixed-precision", "bf16", "--epochs", "2")
    assert other.steps[0]["loss"] != full.steps[0]["loss"]
    assert other.accuracy > 0.9


class EpochOrder(Sampler[int]):
    """The order in which ptacc goes through the data with seed 0, epoch by epoch."""

    def __init__(self, samples: int) -> None:
        self._samples, self._epoch = samples, 0

    @override
    def __iter__(self) -> Iterator[int]:
        self._epoch += 1
        return iter(permutation(0, self._epoch - 1, self._samples))

    def __len__(self) -> int:
        return self._samples


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(32, 1), (16, 2)])
def test_plain_pytorch_gives_the_same_numbers(double: Outcome, batch_size: int, accumulate: int) -> None:
    train, validation, _ = digits_plain.load_data(torch.float64)
    torch.manual_seed(0)
    rows = digits_plain.train(
        digits_plain.make_model().double(),
        DataLoader(train, batch_size=batch_size, sampler=EpochOrder(len(train))),
        DataLoader(validation, batch_size=batch_size),
        epochs=2,
        accumulate=accumulate,
    )
    for row, epoch in zip(rows, double.epochs, strict=True):
        ours = {name.rpartition("/")[-1]: value for name, value in epoch.items()} | {
            "eval_loss": epoch["evaluations//loss"]
        }
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(ours[name], rel=RELATIVE, abs=0), name


@pytest.mark.timeout(120)
def test_plain_pytorch_runs_as_a_script() -> None:
    script = [sys.executable, "-W", "error", str(EXAMPLES / "digits_plain.py"), "--epochs", "2"]
    ended = launch(script, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert accuracy_in(ended.stdout) > 0.9
