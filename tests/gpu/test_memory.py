"""Running out of a GPU's memory: the note of the error, and torch's snapshots."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from ptacc import MemorySnapshot, Trainer
from tests.gpu.parts import make_data, make_net


def make(snapshots: MemorySnapshot, steps: int) -> Trainer:
    """Make a trainer whose loss needs too much memory after some steps."""
    net, loss = make_net(), nn.CrossEntropyLoss()

    class Growing(Trainer):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if self.progress.steps == steps:
                return torch.empty(1 << 44, device=self.device)
            return super().compute_train_loss(outputs, targets)

    optimizer = Adam(net.parameters())
    return Growing(net, loss_func=loss, optimizer=optimizer, default_callbacks=(), callbacks=[snapshots])


def test_the_error_describes_the_memory_and_a_snapshot_is_written(tmp_path: Path) -> None:
    trainer = make(MemorySnapshot(tmp_path, steps=[1]), steps=2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train(make_data(), max_steps=4)
    (note,) = caught.value.__notes__
    assert "in step 3 of training" in note
    assert "optimizer state" in note
    assert "allocated: " in note
    assert {path.name for path in tmp_path.iterdir()} == {
        "rank0_step1.pickle",
        "rank0_step3_out_of_memory.pickle",
    }
    assert all(path.stat().st_size for path in tmp_path.iterdir())
