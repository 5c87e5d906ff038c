"""Trains on a GPU with everything that a checkpoint stores, and prints a digest of the final state.

`killed.py DIRECTORY foreground STEP` kills its own process after a step. Without a step, it resumes from the newest
checkpoint. With `background`, it saves in the background.
"""

import hashlib
import json
import os
import signal
import sys
from dataclasses import field

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Cadence,
    Callback,
    CheckpointMixin,
    EMAMixin,
    GradAccumMixin,
    SeedMixin,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.mixins.ema import EMA_STATE
from ptacc.protocols import Precision
from ptacc.serialization.json_codec import encode
from ptacc.tensors.structures import as_bytes


class Resumed(AMPMixin, GradAccumMixin, EMAMixin, SeedMixin, CheckpointMixin, Trainer):
    mixed_precision: Precision | None = "fp16"
    gradient_accumulation_steps: int = 2
    ema_decay: float = 0.9
    seed: int | None = 7
    deterministic: bool = True
    checkpoint_every: Cadence | None = field(default_factory=lambda: Steps(3))
    resume: bool | str | os.PathLike[str] = True


class Killed(Callback[TrainerCore]):
    """Kills the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def digest(state: object) -> str:
    result = hashlib.sha256()
    for name, tensor in sorted(encode(state).tensors.items()):
        result.update(name.encode())
        result.update(as_bytes(tensor))
    return result.hexdigest()


def main(directory: str, how: str, killed_after: int | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4))
    data: tuple[Tensor, Tensor] = torch.randn(200, 16), torch.randint(4, (200,))
    data[0][45] = 6e4  # it overflows in fp16, so that a step of each epoch is skipped
    trainer = Resumed(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(net.parameters(), lr=1e-2),
        checkpoint_dir=directory,
        checkpoint_in_background=how == "background",
        callbacks=[] if killed_after is None else [Killed(killed_after)],
        default_callbacks=(),
    )
    history = trainer.train(TensorDataset(*data), num_epochs=3, per_device_batch_size=16)
    final = {
        "device": trainer.device.type,
        "steps": trainer.progress.steps,
        "weights": digest(net.state_dict()),
        "moments": digest(trainer.optimizer.state_dict()),
        "averages": digest(dict(trainer.run[EMA_STATE].tensors)),
        "scaler": trainer.run.engine.get_state().shared,
        "losses": [repr(step.loss) for step in history.steps],
    }
    print(json.dumps(final))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
