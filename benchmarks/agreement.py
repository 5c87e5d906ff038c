"""What it costs that several processes agree on when to stop.

The model is tiny (a perceptron 64-128-10, batches of 32), so that a step is short and the cost shows. In one run,
blocks of steps with a vote after each step and blocks without any take turns; the ratio of two neighbouring blocks
tells what a vote costs, as a part of a step. A trainer votes every so many steps, as it works out at its start: the
cost is the one number divided by the other. (Measured with votes that seldom, it drowns in the noise of the machine.)
CPU time counts all threads of the process, those of the communication among them.

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
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.distributed.stop_vote import StopConsensus, StopRequest


class NoVote(StopConsensus):
    """Asks nobody."""

    def __init__(self, peers: DistributedRuntime) -> None:
        super().__init__(peers, stop_check_every=1)

    @override
    def poll(self, step: int, wish: StopRequest | None) -> StopRequest | None:
        return wish

    @override
    def at_boundary(self, wish: StopRequest | None) -> StopRequest | None:
        return wish


class Blocks(Callback[TrainerCore]):
    """Lets blocks of steps with the vote and without take turns, and times them.

    Args:
        size: Steps of a block.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.timed: list[list[float]] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.votes: tuple[StopConsensus, StopConsensus] = (trainer.run.vote, NoVote(trainer.run.distributed))
        self.timed = []
        self.started = clocks()

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step % self.size == 0:
            now = clocks()
            self.timed.append([end - start for start, end in zip(self.started, now, strict=True)])
            trainer.run.vote = self.votes[self.order(len(self.timed))]
            self.started = clocks()

    @staticmethod
    def order(block: int) -> int:
        """Return which kind a block is of: 0 with the vote, 1 without; in pairs that begin with either kind."""
        return (block + block // 2) % 2


def clocks() -> list[float]:
    return [time.process_time(), time.perf_counter()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=64, help="steps of a block")
    asked = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(32 * 256, 64), torch.randint(10, (32 * 256,)))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    blocks = Blocks(asked.steps)
    trainer = Trainer(
        model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, default_callbacks=(), callbacks=[blocks]
    )
    trainer.train(data, max_steps=4 * asked.steps, per_device_batch_size=32)
    stop_check_every = trainer.run.vote.stop_check_every
    trainer.train(data, max_steps=2 * asked.pairs * asked.steps, per_device_batch_size=32, stop_check_every=1)

    pairs = [sorted((blocks.order(i), *blocks.timed[i]) for i in (2 * p, 2 * p + 1)) for p in range(asked.pairs)]
    world_size = trainer.distributed.world_size
    trainer.print(
        f"{world_size} processes, {asked.pairs} pairs of blocks of {asked.steps} steps; votes every {stop_check_every}"
    )
    for index, kind in enumerate(("CPU time", "clock"), start=1):
        step = 1e6 * statistics.median(without[index] for _, without in pairs) / asked.steps
        extra = [with_votes[index] / without[index] - 1 for with_votes, without in pairs]
        vote = statistics.median(extra)
        error = 1.2533 * statistics.stdev(extra) / len(extra) ** 0.5  # of a median, for normal noise
        trainer.print(
            f"{kind:9} a step {step:.0f} us, a vote {vote:.3f} of it (standard error {error:.3f}): "
            f"agreement costs {100 * vote / stop_check_every:.2f} % "
            f"(standard error {100 * error / stop_check_every:.2f})"
        )


if __name__ == "__main__":
    main()
