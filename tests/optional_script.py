"""Use what needs optional packages, and write the results and the errors as JSON. A test runs it without them."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ptacc.cli
import ptacc.options
import ptacc.report
import ptacc.samplers
import ptacc.schedules
import ptacc.trainers
from ptacc import CheckpointMixin, DeepSpeedMixin, RunHistory, Trainer
from ptacc.options.parsing import read_file
from ptacc.testing import iris, iris_parts
from ptacc.tracking import AccelerateTracker
from ptacc.tuning import LearningRateSearch


class SavingTrainer(CheckpointMixin, Trainer):
    """Saves to a bucket."""


class ShardingTrainer(DeepSpeedMixin, Trainer):
    """Shards with DeepSpeed."""


def train(trainer: Trainer) -> RunHistory:
    return trainer.train(iris(), iris(), num_epochs=1)


def launch_deepspeed() -> RunHistory:
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    os.environ.update(launch)
    return train(ShardingTrainer(**iris_parts()))


def read_yaml() -> dict[str, object]:
    Path("options.yaml").write_text("seed: 3", encoding="utf-8")
    return read_file(Path("options.yaml"))


USES: dict[str, Callable[[], object]] = {
    # First, as it starts a launch of one process.
    "deepspeed": launch_deepspeed,
    "train": lambda: train(Trainer(**iris_parts())),
    "explain": lambda: Trainer(**iris_parts()).explain(iris(), num_epochs=1),
    "yaml": read_yaml,
    "history.plot": lambda: train(Trainer(**iris_parts())).plot(),
    "history.to_dataframe": lambda: train(Trainer(**iris_parts())).to_dataframe(),
    "search.plot": lambda: LearningRateSearch((0.1,), (1.0,)).plot("rates.png"),
    "parse_options": lambda: ptacc.options.parse_options(Trainer, arguments=[]),
    "wandb": lambda: AccelerateTracker("wandb"),
    "s3": lambda: train(SavingTrainer(**iris_parts(), checkpoint_dir="s3://bucket/run")),
}


def attempt(use: Callable[[], object]) -> str:
    try:
        return f"works: {use()}"
    except Exception as error:
        return "".join(traceback.format_exception_only(error))


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: attempt(use) for name, use in USES.items()}))
