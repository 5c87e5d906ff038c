"""Trains, and fails on one rank in the fourth step: `failing.py raises 1` or `failing.py dies 1`."""

import os
import signal
import sys

from torch import Tensor
from typing_extensions import override

from ptacc import StepOutput, Trainer
from ptacc.testing import tiny_data, tiny_parts


class Failing(Trainer):
    way: str = "raises"
    rank: int = 0

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.progress.steps == 3 and self._distributed.rank == self.rank:
            if self.way == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("on purpose")
        return super().train_step(batch)


def main(way: str, rank: str) -> None:
    trainer = Failing(**tiny_parts(), way=way, rank=int(rank))
    trainer.train(tiny_data(24), num_epochs=3, per_device_batch_size=4)


if __name__ == "__main__":
    main(*sys.argv[1:])
