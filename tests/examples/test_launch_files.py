"""The configurations of `accelerate launch`: those that can run here run, and Accelerate reads them all."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]

from examples import digits_plain
from tests.marks import DEEPSPEED
from tests.ranks import find_free_port, launch

pytestmark = DEEPSPEED
EXAMPLES = Path(digits_plain.__file__).parent
LAUNCH = EXAMPLES / "launch"
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
HERE = {"one_cpu": "torch", "cpus": "torch", "fsdp": "fsdp", "deepspeed": "deepspeed"}
"""Those that need no GPU, with the engine that they are for."""
ELSEWHERE = {"gpus", "hosts"}


def processes_of(config: str) -> int:
    read: Any = load_config_from_file(str(LAUNCH / f"{config}.yaml"))
    return int(read.num_processes)


def losses_under(config: str, runs: Path) -> tuple[float, float]:
    """Train the small GPT-2 for a few steps; return the losses that it reports."""
    processes = processes_of(config)
    options = ("--engine", HERE[config], "--steps", "6", "--runs", str(runs / config))
    ended = launch(
        (
            *(ACCELERATE, "launch", "--config_file", str(LAUNCH / f"{config}.yaml")),
            *("--num_cpu_threads_per_process", "1", "--main_process_port", str(find_free_port())),
            *(str(EXAMPLES / "gpt.py"), "--per-device-batch-size", str(16 // processes), *options),
        ),
        env={"HF_HUB_OFFLINE": "1", **({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {})},
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    (found,) = re.findall(r"step 6: ([\d.]+) a byte in training, ([\d.]+) in evaluation", ended.stdout)
    return float(found[0]), float(found[1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    return losses_under("one_cpu", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("config", sorted(HERE.keys() - {"one_cpu"}))
def test_a_configuration_gives_the_numbers_of_one_process(
    config: str, tmp_path: Path, alone: tuple[float, float]
) -> None:
    assert losses_under(config, tmp_path) == pytest.approx(alone, abs=2e-4)


def test_accelerate_reads_every_configuration() -> None:
    there = {path.stem for path in LAUNCH.glob("*.yaml")}
    assert there == HERE.keys() | ELSEWHERE
    for name in there:
        assert processes_of(name) >= 1
