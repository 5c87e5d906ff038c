"""Trains on two processes. One fails, and the other waits for a kernel that does not end.

`waiting.py cpu` stands in for it on a machine without a GPU.
"""

import sys
import time

import torch
from torch import Tensor
from typing_extensions import override

from ptacc import StepOutput, Trainer
from ptacc.testing import tiny_data, tiny_parts


class Waiting(Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.progress.steps == 3 and self.distributed.rank == 1:
            raise KeyError("on purpose")
        if self.progress.steps == 3:
            wait_forever()
        return super().train_step(batch)


def wait_forever() -> None:
    if "cpu" in sys.argv:
        time.sleep(1000)
    number = torch.ones((), device="cuda")
    torch.cuda._sleep(10**13)  # type: ignore[no-untyped-call]  # noqa: SLF001  # used by torch's own tests
    number.item()


if __name__ == "__main__":
    Waiting(**tiny_parts()).train(tiny_data(), num_epochs=9, per_device_batch_size=2)
