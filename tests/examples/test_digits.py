"""Run the digits examples on the CPU: with Python, `accelerate launch` and `torchrun`."""

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
from ptacc.testing import epoch_order
from tests.ranks import find_free_port, launch

EXAMPLES = Path(digits_plain.__file__).parent
SCRIPTS = Path(sys.executable).parent
TOLERANCE = 1e-10
"""Relative tolerance in float64 after 80 steps. The measured difference was 1e-15."""


@dataclass(frozen=True)
class LaunchCase:
    """A way to launch the example, with options for a global batch size of 32."""

    launcher: tuple[str, ...] = (sys.executable,)
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


SINGLE_PROCESS = LaunchCase()
ACCUMULATED = LaunchCase(options=("--per-device-batch-size", "16", "--accumulate", "2"))
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
HALF = ("--per-device-batch-size", "16")
SETTINGS = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
ACCELERATE = (str(SCRIPTS / "accelerate"), "launch", *SETTINGS, "--num_cpu_threads_per_process", "1")
ACCELERATE_1 = LaunchCase((*ACCELERATE, "--cpu", "--num_processes", "1"))
ACCELERATE_2 = LaunchCase((*ACCELERATE, "--multi_gpu", "--num_processes", "2"), HALF, ON_CPU)
TORCHRUN_2 = LaunchCase((str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2"), HALF, ON_CPU)


@dataclass(frozen=True)
class ExampleResult:
    output: str
    steps: list[dict[str, float]]
    epochs: list[dict[str, float]]
    plot: bytes

    @property
    def accuracy(self) -> float:
        return parse_accuracy(self.output)


def parse_accuracy(output: str) -> float:
    (percent,) = re.findall(r"accuracy (.*)% of 360 digits", output)
    return float(percent) / 100


def run(case: LaunchCase, folder: Path, *options: str) -> ExampleResult:
    """Run the example, and assert that it succeeds without a warning."""
    history, plot = folder / "history.jsonl", folder / "digits.png"
    launcher = list(case.launcher)
    if "--multi_gpu" in launcher:
        launcher += ["--main_process_port", str(find_free_port())]
    command = [*launcher, str(EXAMPLES / "digits.py"), *case.options, *options]
    files = ["--history", str(history), "--out", str(plot)]
    process = launch([*command, *files], env={"PYTHONWARNINGS": "error", **case.environment}, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    records = [json.loads(line) for line in history.read_text().splitlines()]
    return ExampleResult(
        process.stdout,
        [flatten_numbers(record) for record in records if record["kind"] == "step"],
        [flatten_numbers(record) for record in records if record["kind"] == "epoch"],
        plot.read_bytes(),
    )


def flatten_numbers(record: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a record without its seconds. Nested names are joined by a slash."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in flatten_numbers(value).items()}
        elif isinstance(value, int | float) and name != "seconds":
            numbers[name] = value
    return numbers


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> ExampleResult:
    """One process, two epochs, in float64."""
    return run(SINGLE_PROCESS, tmp_path_factory.mktemp("double"), "--double", "--epochs", "2")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> ExampleResult:
    """One process, with the default options."""
    return run(SINGLE_PROCESS, tmp_path_factory.mktemp("full"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ACCUMULATED, id="accumulated"),
        pytest.param(ACCELERATE_1, id="accelerate launch, 1 process"),
        pytest.param(ACCELERATE_2, id="accelerate launch, 2 processes"),
        pytest.param(TORCHRUN_2, id="torchrun, 2 processes"),
    ],
)
def test_every_launch_gives_the_same_results_in_float64(
    case: LaunchCase, double: ExampleResult, tmp_path: Path
) -> None:
    other = run(case, tmp_path, "--double", "--epochs", "2")
    assert len(other.steps) == 80
    assert {"loss", "learning_rate", "items", "logged/grad_norm"} <= other.steps[0].keys()
    for expected, actual in zip(double.steps + double.epochs, other.steps + other.epochs, strict=True):
        assert actual == pytest.approx(expected, rel=TOLERANCE, abs=0)
    assert other.accuracy == double.accuracy
    assert other.output.count("\n") == double.output.count("\n")  # only rank 0 prints


@pytest.mark.timeout(120)
def test_two_processes_give_similar_results_in_float32(full: ExampleResult, tmp_path: Path) -> None:
    other = run(TORCHRUN_2, tmp_path)
    for expected, actual in zip(full.steps[:20], other.steps[:20], strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert abs(other.accuracy - full.accuracy) * 360 < 2.1


@pytest.mark.timeout(120)
def test_reaches_98_percent(full: ExampleResult) -> None:
    assert full.accuracy >= 0.98
    assert len(full.epochs) == 12
    assert full.epochs[-1]["train_loss"] < full.epochs[0]["train_loss"]


@pytest.mark.timeout(120)
def test_plots_a_png(full: ExampleResult) -> None:
    assert full.plot.startswith(b"\x89PNG\r\n\x1a\n")
    assert full.plot.rstrip().endswith(b"IEND\xaeB`\x82")


@pytest.mark.timeout(120)
def test_bf16_changes_the_losses_and_trains(full: ExampleResult, tmp_path: Path) -> None:
    other = run(SINGLE_PROCESS, tmp_path, "--mixed-precision", "bf16", "--epochs", "2")
    assert other.steps[0]["loss"] != full.steps[0]["loss"]
    assert other.accuracy > 0.9


class EpochOrder(Sampler[int]):
    """The order of the data in ptacc with seed 0, for one epoch after the other."""

    def __init__(self, samples: int) -> None:
        self._samples, self._epoch = samples, 0

    @override
    def __iter__(self) -> Iterator[int]:
        self._epoch += 1
        return iter(epoch_order(0, self._epoch - 1, self._samples))

    def __len__(self) -> int:
        return self._samples


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("batch_size", "accumulate"), [(32, 1), (16, 2)])
def test_plain_pytorch_gives_the_same_numbers(double: ExampleResult, batch_size: int, accumulate: int) -> None:
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
        expected = {name.rpartition("/")[-1]: value for name, value in epoch.items()} | {
            "eval_loss": epoch["evaluations//loss"]
        }
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=0), name


@pytest.mark.timeout(120)
def test_plain_pytorch_runs_as_a_script() -> None:
    script = [sys.executable, "-W", "error", str(EXAMPLES / "digits_plain.py"), "--epochs", "2"]
    process = launch(script, timeout=60)
    assert (process.returncode, process.stderr) == (0, "")
    assert parse_accuracy(process.stdout) > 0.9
