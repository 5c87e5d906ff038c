"""A launch with one process on one GPU, and FSDP on one GPU."""

import json
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ptacc import AMPMixin, FSDPMixin, Trainer
from ptacc.engines.default import TorchEngine
from ptacc.protocols import Precision
from tests.gpu.parts import BATCH, make_data, make_net, train
from tests.ranks import launch

ROOT = Path(__file__).parent.parent.parent
PATHS = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))


def run_script(name: str, *, processes: int = 1, **environment: str) -> CompletedProcess[str]:
    script = str(Path(__file__).parent / "scripts" / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return launch([*command, script], env={"PYTHONPATH": PATHS, **environment}, timeout=100)


def read_report(name: str) -> dict[str, Any]:
    """Run a script on one process, and return the report that it printed."""
    done = run_script(name)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_launch_with_one_process_trains_as_without_a_launch(device: torch.device) -> None:
    report = read_report("one_process.py")
    assert "nccl" in report["backend"]
    assert report["losses"] == pytest.approx([step.loss for step in train("bf16").history.steps], rel=1e-5)
    assert device.type == "cuda"


def test_layers_outside_of_the_plan_are_on_the_gpu_during_a_run() -> None:
    assert read_report("tensor_parallel.py") == {"during": ["cuda"], "after": ["cpu"], "outputs": [3, 2]}


def test_a_sharded_model_trains_in_bf16_with_clipped_gradients() -> None:
    report = read_report("fsdp.py")
    assert report["losses"] == sorted(report["losses"], reverse=True)
    assert not report["is_sharded"]


def test_a_synchronized_batch_norm_gives_torchs_numbers() -> None:
    assert read_report("batch_norm.py") == pytest.approx(
        {"outputs": 0, "gradients": 0, "mean": 0, "variance": 0}, abs=1e-4
    )


def test_a_process_that_waits_for_a_kernel_is_ended_after_another_failed() -> None:
    done = run_script("waiting.py", processes=2, ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert "RankFailedError: rank 1 failed after step 3: KeyError: 'on purpose'\nRank 0 was here" in done.stderr


def test_a_seeded_run_on_the_cpu_initializes_no_gpu() -> None:
    code = (
        "import torch; from ptacc import SeedMixin, Trainer; from ptacc.testing import tiny_data, tiny_parts\n"
        "class Seeded(SeedMixin, Trainer): ...\n"
        "Seeded(**tiny_parts(), seed=1).train(tiny_data(), num_epochs=1); print(torch.cuda.is_initialized())"
    )
    done = launch([sys.executable, "-c", code], env={"ACCELERATE_USE_CPU": "true"}, timeout=100)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["False"]), done.stderr


class Mixed(AMPMixin, Trainer):
    mixed_precision: Precision | None = "bf16"


class Sharded(FSDPMixin, Mixed): ...


@pytest.mark.usefixtures("deterministic")
def test_one_process_shards_nothing(device: torch.device) -> None:
    def train_one(kind: type[Mixed]) -> Mixed:
        net = make_net()
        trainer = kind(
            net, loss_func=nn.CrossEntropyLoss(), optimizer=SGD(net.parameters(), lr=0.1), default_callbacks=()
        )
        trainer.train(
            make_data(), num_epochs=1, per_device_batch_size=BATCH, train_dataloader_kwargs={"shuffle": False}
        )
        return trainer

    sharded, plain = train_one(Sharded), train_one(Mixed)
    assert type(sharded.run.engine) is TorchEngine
    for weight, expected in zip(sharded.model.parameters(), plain.model.parameters(), strict=True):
        assert weight.device.type == device.type
        assert torch.equal(weight, expected)
