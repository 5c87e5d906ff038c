"""What it costs that several processes agree on when to stop: training with the vote beside training without one.

The model is tiny (a perceptron 64-128-10, batches of 32), so that a step is short and the cost shows. Both kinds of
run take turns in the same processes, and each ratio is between two neighbours in time. CPU time counts all threads of
the process, those of the communication among them; time by the clock is disturbed by whatever else the machine does.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/agreement.py
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Callback, Trainer, TrainerCore
from ptacc.core.agreement import Stop, StopVote


class NoVote(StopVote):
    """Asks nobody."""

    @override
    def outcome(self, step: int, wish: Stop | None) -> Stop | None:
        return wish

    @override
    def at_boundary(self, wish: Stop | None) -> Stop | None:
        return wish


class Stopwatch(Callback[TrainerCore]):
    """Times the steps of a run, without its set-up."""

    def __init__(self) -> None:
        self.votes = True
        self.seconds: list[float] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        if not self.votes:
            trainer.run.vote = NoVote(trainer.peers, 1)
        self.started = [time.process_time(), time.perf_counter()]

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        now = [time.process_time(), time.perf_counter()]
        self.seconds = [end - start for start, end in zip(self.started, now, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=640, help="steps of a run")
    asked = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(32 * 64, 64), torch.randint(10, (32 * 64,)))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    watch = Stopwatch()
    trainer = Trainer(
        model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, default_callbacks=(), callbacks=[watch]
    )

    def seconds_of(*, votes: bool) -> list[float]:
        watch.votes = votes
        trainer.train(data, max_steps=asked.steps, per_device_batch_size=32)
        return watch.seconds

    seconds_of(votes=True)  # warm
    ratios: list[list[float]] = []
    without: list[list[float]] = []
    for pair in range(asked.pairs):
        first = seconds_of(votes=pair % 2 == 0)
        second = seconds_of(votes=pair % 2 == 1)
        voting, mute = (first, second) if pair % 2 == 0 else (second, first)
        ratios.append([a / b for a, b in zip(voting, mute, strict=True)])
        without.append(mute)

    trainer.print(
        f"{trainer.peers.world_size} processes, {asked.pairs} pairs of runs of {asked.steps} steps, on rank 0"
    )
    for index, kind in enumerate(("CPU time", "clock")):
        column = sorted(pair[index] for pair in ratios)
        low, middle, high = statistics.quantiles(column, n=4)
        step = statistics.median(seconds[index] for seconds in without) / asked.steps
        trainer.print(
            f"{kind:9} {1e6 * step:7.1f} us a step without the vote; with it x {middle:.4f} "
            f"(quartiles {low:.4f} to {high:.4f})"
        )


if __name__ == "__main__":
    main()
