"""The configurations for `accelerate launch`: those for a CPU run, and Accelerate reads all of them."""

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
CPU_CONFIGS = {"one_cpu": "torch", "cpus": "torch", "fsdp": "fsdp", "deepspeed": "deepspeed"}
"""Configurations that run on a CPU, with their engine."""
OTHER_CONFIGS = {"gpus", "hosts"}


def read_num_processes(config: str) -> int:
    config_values: Any = load_config_from_file(str(LAUNCH / f"{config}.yaml"))
    return int(config_values.num_processes)


def train_and_read_losses(config: str, runs: Path) -> tuple[float, float]:
    """Train the small GPT-2 for a few steps, and return its training and evaluation loss."""
    processes = read_num_processes(config)
    options = ("--engine", CPU_CONFIGS[config], "--steps", "6", "--runs", str(runs / config))
    process = launch(
        (
            *(ACCELERATE, "launch", "--config_file", str(LAUNCH / f"{config}.yaml")),
            *("--num_cpu_threads_per_process", "1", "--main_process_port", str(find_free_port())),
            *(str(EXAMPLES / "gpt.py"), "--per-device-batch-size", str(16 // processes), *options),
        ),
        env={"HF_HUB_OFFLINE": "1", **({"ACCELERATE_USE_CPU": "true"} if processes > 1 else {})},
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    (losses,) = re.findall(r"step 6: ([\d.]+) per byte in training, ([\d.]+) in evaluation", process.stdout)
    return float(losses[0]), float(losses[1])


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    return train_and_read_losses("one_cpu", tmp_path_factory.mktemp("single_process"))


@pytest.mark.parametrize("config", sorted(CPU_CONFIGS.keys() - {"one_cpu"}))
def test_a_configuration_gives_the_losses_of_one_process(
    config: str, tmp_path: Path, single_process: tuple[float, float]
) -> None:
    assert train_and_read_losses(config, tmp_path) == pytest.approx(single_process, abs=2e-4)


def test_accelerate_reads_every_configuration() -> None:
    configs = {path.stem for path in LAUNCH.glob("*.yaml")}
    assert configs == CPU_CONFIGS.keys() | OTHER_CONFIGS
    for name in configs:
        assert read_num_processes(name) >= 1
