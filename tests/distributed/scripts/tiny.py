"""Trains on the tiny data, evaluates and predicts; rank 0 prints the results as one line of JSON.

With a number, `tiny.py 4`, it prints the indices of the samples that each process gets from that step on.
"""

import json
import sys
from dataclasses import field
from typing import Any

from torch import Tensor
from typing_extensions import override

from ptacc import DataLoaderConfig, SeedMixin, StepOutput, Trainer
from ptacc.data.sources import make_source
from ptacc.testing import tiny_data, tiny_parts

DATA = tiny_data(24)
GLOBAL_BATCH = 8
SEED = 5


class Seeing(SeedMixin, Trainer):
    """Records the indices of the samples that this process trains on, step by step."""

    seed: int | None = SEED
    seen: list[list[int]] = field(init=False, default_factory=list)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        is_sample = (batch[0][:, None] == DATA.tensors[0]).all(dim=-1)  # (batch, samples)
        self.seen.append(is_sample.nonzero()[:, 1].tolist())
        return super().train_step(batch)


def report(trainer: Seeing) -> dict[str, Any]:
    world_size = trainer.distributed.world_size
    size, held_out = GLOBAL_BATCH // world_size, tiny_data(13)
    history = trainer.train(DATA, held_out, num_epochs=2, per_device_batch_size=size)
    result = trainer.evaluate(held_out, per_device_batch_size=size)
    predictions = trainer.predict(held_out, per_device_batch_size=size)
    seen = trainer.distributed.gather(trainer.seen)
    return {
        "world_size": world_size,
        "seen": seen,  # [rank][step][sample]
        "losses": [step.loss for step in history.steps],
        "epoch_losses": [epoch.train_loss for epoch in history],
        "eval_losses": [epoch.eval_loss for epoch in history],
        "eval_loss": result.loss,
        "predictions": len(predictions),
    }


def order_from(step: int, trainer: Seeing) -> list[list[list[int]]]:
    """Return the indices, as [rank][step][sample], which follow from the seed of the run alone."""
    distributed, steps_per_epoch = trainer._distributed, len(DATA) // GLOBAL_BATCH  # noqa: SLF001
    loader = DataLoaderConfig(DATA, GLOBAL_BATCH // distributed.world_size, None, {}).build(shuffle=True)
    source = make_source(loader, distributed, SEED)
    epoch, batch = divmod(step, steps_per_epoch)
    batches = [
        *source.epoch(epoch, batch * GLOBAL_BATCH),
        *(later for e in range(epoch + 1, 2) for later in source.epoch(e)),
    ]
    return distributed.gather([list(batch.indices or ()) for batch in batches])


if __name__ == "__main__":
    trainer = Seeing(**tiny_parts())
    trainer.print(json.dumps(order_from(int(sys.argv[1]), trainer) if len(sys.argv) > 1 else report(trainer)))
