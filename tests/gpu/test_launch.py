"""A launch with one process on one GPU, and FSDP on one GPU."""

import json
import os
import sys
from pathlib import Path

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
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


def test_a_launch_with_one_process_trains_as_without_a_launch(device: torch.device) -> None:
    script = str(Path(__file__).parent / "scripts" / "one_process.py")
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = launch([*LAUNCH, script], env={"PYTHONPATH": os.pathsep.join(filter(None, paths))}, timeout=100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "nccl" in report["backend"]
    assert report["losses"] == pytest.approx([step.loss for step in train("bf16").history.steps], rel=1e-5)
    assert device.type == "cuda"


def test_layers_outside_of_the_plan_are_on_the_gpu_during_a_run() -> None:
    script = str(Path(__file__).parent / "scripts" / "tensor_parallel.py")
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    done = launch([*LAUNCH, script], env={"PYTHONPATH": os.pathsep.join(filter(None, paths))}, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"during": ["cuda"], "after": ["cpu"], "outputs": [3, 2]}


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
