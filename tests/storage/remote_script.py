"""Trains the tiny problem with its checkpoints at a URL: `remote_script.py URL EPOCHS`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import tests.checkpoint.objects  # noqa: F401  # registers the protocol
from ptacc import CheckpointMixin, SeedMixin, Trainer
from ptacc.testing import tiny_data, tiny_parts


class Saved(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 5


def main(url: str, epochs: str) -> None:
    Saved(**tiny_parts(), checkpoint_dir=url, resume=True).train(
        tiny_data(12), num_epochs=int(epochs), per_device_batch_size=2
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
