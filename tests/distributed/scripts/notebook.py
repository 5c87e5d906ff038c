"""Launches twice from one process, as the cells of a notebook do: `notebook.py notebook_launcher function 29500`.

The trainer is made before the launch.
"""

import json
import sys
from functools import partial, update_wrapper
from typing import Any

import accelerate
from typing_extensions import override

from ptacc import Callback, SeedMixin, Trainer, TrainerCore
from ptacc.testing import tiny_data, tiny_parts


class Seeded(SeedMixin, Trainer): ...


class Report(Callback[TrainerCore]):
    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        losses = [step.loss for step in trainer.run.history.steps]
        trainer.print(json.dumps({"world_size": trainer.distributed.world_size, "losses": losses}))


def train(trainer: Trainer) -> None:
    trainer.train(tiny_data(24), tiny_data(13), num_epochs=2, per_device_batch_size=4)


def main(launcher: str, what: str, port: str) -> None:
    trainer = Seeded(**tiny_parts(), seed=5, callbacks=[Report()])
    options: dict[str, Any] = {"num_processes": 2}
    if launcher == "notebook_launcher":
        options["use_port"] = port
    launch = getattr(accelerate, launcher)
    for _ in range(2):
        if what == "function":
            launch(train, (trainer,), **options)
        else:  # torch reads its `__name__`, which a partial lacks
            method = update_wrapper(partial(trainer.train, num_epochs=2, per_device_batch_size=4), trainer.train)
            launch(method, (tiny_data(24), tiny_data(13)), **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
