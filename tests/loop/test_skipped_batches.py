"""A batch for which `collate_fn` returns None is left out, as `continue` leaves it out of a plain loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate

from ptacc import CheckpointMixin, GradAccumMixin, Pair, SeedMixin, Trainer
from ptacc.errors import DataError
from tests.checkpoint.runs import make_leg
from tests.ranks import run_ranks

BROKEN = {0, 1, 2, *range(9, 15), 16, *range(18, 24), 33, 34, 35}
"""In batches of 3: the first one, two in a row twice, a third of one, and the last one."""
Sample = tuple[Tensor, Tensor] | None


class Data(list[Sample]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        pairs = [(torch.randn(3, generator=generator), torch.randn(1, generator=generator)) for _ in range(36)]
        super().__init__(None if index in BROKEN else pair for index, pair in enumerate(pairs))


def collate(samples: list[Sample]) -> Pair | None:
    intact = [sample for sample in samples if sample is not None]
    return tuple(default_collate(intact)) if intact else None


class Skipping(CheckpointMixin, GradAccumMixin, SeedMixin, Trainer):
    seed: int | None = 4


def make_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def make_plain_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, 1)


def run(
    directory: Path, net: nn.Module, accumulation: int = 1, until: int | None = None, size: int = 3, **options: Any
) -> tuple[dict[str, Tensor], int]:
    trainer = make_leg(Skipping, net, directory, until, loss_func=mse_loss, gradient_accumulation_steps=accumulation)
    settings: Any = {"per_device_batch_size": size, "train_dataloader_kwargs": {"shuffle": False, **options}}
    history = trainer.train(Data(), collate_fn=collate, num_epochs=2, stop_check_every=1, **settings)
    return net.state_dict(), history[-1].step


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_run_is_that_of_a_loop_that_continues(tmp_path: Path, accumulation: int) -> None:
    net, data = make_net(), Data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        batches = [collate(data[start : start + 3]) for start in range(0, 36, 3)]
        for start in range(0, 12, accumulation):
            window = [batch for batch in batches[start : start + accumulation] if batch is not None]
            total = sum(len(inputs) for inputs, _ in window)
            for inputs, targets in window:
                (mse_loss(net(inputs), targets) / (total / len(inputs))).backward()  # type: ignore[no-untyped-call]
            if window:
                optimizer.step()
                optimizer.zero_grad()
    trained, _ = run(tmp_path, make_net(), accumulation)
    assert same(trained, net.state_dict())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stops", [[1, 3, 6, None], [2, 5, 7, 8, None]])
def test_it_resumes_exactly(tmp_path: Path, stops: list[int | None], workers: int) -> None:
    kwargs: Any = {"num_workers": workers, "timeout": 30 * workers}
    whole = run(tmp_path / "whole", make_net(), **kwargs)
    legs = [run(tmp_path / "legs", make_net(), until=until, **kwargs) for until in stops]
    assert legs[-1][1] == whole[1] == 12
    assert same(legs[-1][0], whole[0])


def test_two_processes_train_as_one_on_the_same_samples(tmp_path: Path) -> None:
    def worker(directory: Path, stops: list[int | None]) -> Any:
        return [run(directory, make_plain_net(), until=until, size=3) for until in stops][-1]

    runs: list[list[int | None]] = [[None], [1, 4, None]]
    whole, legs = (run_ranks(worker, 2, tmp_path / f"{len(stops)}", stops) for stops in runs)
    alone = run(tmp_path / "alone", make_plain_net(), size=6)
    for state, steps in (*whole, *legs):
        assert steps == alone[1]
        assert same(state, whole[0][0])
        torch.testing.assert_close(state, alone[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_counts_the_other_samples(world_size: int) -> None:
    def worker() -> float:
        net = make_plain_net()
        trainer: Any = Trainer(
            net, loss_func=mse_loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), default_callbacks=()
        )
        loss: float = trainer.evaluate(Data(), collate_fn=collate, per_device_batch_size=3).loss
        return loss

    inputs, targets = collate(list(Data())) or pytest.fail("no samples")
    expected = mse_loss(make_plain_net()(inputs), targets).item()
    assert run_ranks(worker, world_size) == pytest.approx([expected] * world_size)


def test_a_prediction_needs_every_sample() -> None:
    net = make_plain_net()
    trainer: Any = Trainer(
        net, loss_func=mse_loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), default_callbacks=()
    )
    with pytest.raises(DataError, match="returned None, which leaves a batch out: a prediction needs one output for"):
        trainer.predict(Data(), collate_fn=collate, per_device_batch_size=3)
