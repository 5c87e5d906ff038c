"""Trains on the tiny data, with a checkpoint per step, and is killed: `elastic.py DIRECTORY 3:1 5:0:host`.

Each argument is one kill: its step, the rank, and `host` to kill the agent that started it as well. Rank 0 writes the
result of the run to the directory.
"""

import json
import os
import signal
import sys
from dataclasses import field
from os import PathLike
from pathlib import Path

from typing_extensions import override

from ptacc import Cadence, CheckpointMixin, SeedMixin, Steps, Trainer
from ptacc.testing import tiny_data, tiny_parts

DATA = tiny_data(24)
GLOBAL_BATCH = 8


class Mortal(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5
    checkpoint_every: Cadence | None = field(default_factory=lambda: Steps(1))
    resume: bool | str | PathLike[str] = True
    deaths: tuple[str, ...] = ()

    @override
    def on_step_start(self) -> None:
        super().on_step_start()
        for death in self.deaths:
            step, rank, *what = death.split(":")
            if (self.progress.steps, self._distributed.rank) == (int(step), int(rank)):
                self._die_once(Path(self.checkpoint_dir).parent / f"died-{step}", with_agent=bool(what))

    def _die_once(self, mark: Path, *, with_agent: bool) -> None:
        if not mark.exists():
            mark.touch()
            if with_agent:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory: Path, *deaths: str) -> None:
    trainer = Mortal(**tiny_parts(), checkpoint_dir=directory / "run", deaths=deaths)
    trainer.train(DATA, num_epochs=3, per_device_batch_size=GLOBAL_BATCH // trainer.distributed.world_size)
    if trainer.distributed.rank == 0:
        result = {
            "losses": [step.loss for step in trainer.history.steps],
            "weights": [tensor.tolist() for tensor in trainer.model.state_dict().values()],
            "world_size": trainer.distributed.world_size,
            "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        }
        (directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
