"""Trains with workers, or evaluates within a run, until a signal ends it: `terminated.py train DIRECTORY [START]`."""

import sys
import time
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from ptacc import CheckpointMixin, StepOutput, Steps, Trainer
from ptacc.protocols import DataLoaderKwargs
from ptacc.testing import tiny_data, tiny_parts


class Slow(CheckpointMixin, Trainer):
    """Creates a file at the fourth step, or within the first evaluation, and waits a moment in each batch."""

    phase: str = "train"

    def pause(self, phase: str) -> None:
        if phase == self.phase and self.progress.steps >= 3:
            Path(f"{self.checkpoint_dir}.ready.{self.distributed.rank}").touch()
        time.sleep(0.02)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.pause("train")
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.pause("evaluate")
        return super().eval_step(batch)


def main(phase: str, directory: str, start: str = "fork") -> None:
    trainer = Slow(**tiny_parts(), checkpoint_dir=directory, phase=phase)
    loading: DataLoaderKwargs = {"num_workers": 2, "multiprocessing_context": start}
    try:
        trainer.train(
            tiny_data(4000),
            tiny_data(4000),
            num_epochs=1,
            per_device_batch_size=2,
            evaluate_every=Steps(4) if phase == "evaluate" else Steps(10_000),
            train_dataloader_kwargs=loading,
            eval_dataloader_kwargs=loading,
        )
    except SystemExit as end:
        Path(f"{directory}.exit.{trainer.distributed.rank}").write_text(f"{end.code}")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
