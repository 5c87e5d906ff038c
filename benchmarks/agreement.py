"""The cost of the votes by which several processes agree on when to stop.

The model is tiny (a perceptron 64-128-10, batches of 32), so that steps are short and the cost shows. One run
alternates between blocks of steps with a vote after each step and blocks without votes. The ratio of two adjacent
blocks gives the cost of a vote. A trainer votes every `stop_check_every` steps, so that its cost is that of a vote
divided by `stop_check_every`. (Measured directly, that cost is smaller than the noise of the machine.) CPU time counts
all threads of the process, including those of gloo.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/agreement.py
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Callback, StepResult, Trainer, TrainerCore
from ptacc.distributed.stop_vote import StopConsensus, StopRequest
from ptacc.types.arguments import DEFAULT_STOP_CHECK_EVERY


class NoVotes(StopConsensus):
    """Decides on each rank alone."""

    @override
    def poll(self, request: StopRequest | None, step: int | None = None) -> StopRequest | None:
        return request


class Blocks(Callback[TrainerCore]):
    """Alternates between blocks of steps with and without votes, and times them.

    Args:
        size: Steps of a block.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.times: list[list[float]] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.votes: tuple[StopConsensus, StopConsensus] = (
            trainer.run.stopping.consensus,
            NoVotes(trainer.run.distributed, 1),
        )
        self.started = read_clocks()

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step % self.size == 0:
            now = read_clocks()
            self.times.append([end - start for start, end in zip(self.started, now, strict=True)])
            trainer.run.stopping.consensus = self.votes[self.kind(len(self.times))]
            self.started = read_clocks()

    @staticmethod
    def kind(block: int) -> int:
        """Return 0 for a block with votes, 1 for one without. Pairs of blocks begin with either kind in turn."""
        return (block + block // 2) % 2


def read_clocks() -> list[float]:
    return [time.process_time(), time.perf_counter()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=64, help="steps of a block")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(32 * 256, 64), torch.randint(10, (32 * 256,)))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    blocks = Blocks(arguments.steps)
    trainer = Trainer(
        model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, default_callbacks=(), callbacks=[blocks]
    )
    max_steps = 2 * arguments.pairs * arguments.steps
    trainer.train(data, max_steps=max_steps, per_device_batch_size=32, stop_check_every=1)

    pairs = [sorted((blocks.kind(i), *blocks.times[i]) for i in (2 * p, 2 * p + 1)) for p in range(arguments.pairs)]
    every = DEFAULT_STOP_CHECK_EVERY
    trainer.print(
        f"{trainer.distributed.world_size} processes, {arguments.pairs} pairs of blocks of {arguments.steps} steps"
    )
    for index, clock in enumerate(("CPU time", "wall time"), start=1):
        step = 1e6 * statistics.median(without[index] for _, without in pairs) / arguments.steps
        ratios = [with_votes[index] / without[index] - 1 for with_votes, without in pairs]
        vote = statistics.median(ratios)
        error = 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median, for normal noise
        trainer.print(
            f"{clock:9}: {step:.0f} us a step, {step * vote:.0f} us a vote ({100 * vote:.1f} % of a step, standard "
            f"error {100 * error:.1f}); votes every {every} steps cost {100 * vote / every:.2f} % of these steps, and "
            f"1 % of steps of {step * vote / every / 10:.1f} ms"
        )


if __name__ == "__main__":
    main()
