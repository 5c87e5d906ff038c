"""Collective calls are synchronised: a call that only one rank makes raises an error that names it."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Callback, EpochRecord, EvalResult, StepOutput, StepResult, Steps, Trainer, TrainerCore
from ptacc.errors import DataError, ModelError, RankFailedError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

SECONDS = 10.0


def call_and_catch(call: Callable[[], object]) -> tuple[str, str, float]:
    """Return the type and the message of the error that a call raises, and the time in seconds."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


# ---- gather


def gather_ragged() -> dict[str, Any]:
    trainer = Trainer(**tiny_parts())
    rank = trainer.distributed.rank
    rows = torch.arange(2.0 * rank).reshape(rank, 2) + 10 * rank
    values = {"rows": rows, "nested": (torch.tensor(float(rank)), [torch.full((2,), rank, dtype=torch.bool)])}
    return trainer.gather(values)


def test_gather_concatenates_ragged_and_nested_tensors() -> None:
    for gathered in run_ranks(gather_ragged, 3):
        assert gathered["rows"].tolist() == [[10.0, 11.0], [20.0, 21.0], [22.0, 23.0]]
        assert gathered["nested"][0].tolist() == [0.0, 1.0, 2.0]
        assert gathered["nested"][1][0].tolist() == [False, False, True, True, True, True]


def test_gather_on_one_process_returns_its_argument() -> None:
    gathered = Trainer(**tiny_parts()).gather((torch.ones(3, 2), torch.tensor(4.0)))
    assert [tuple(part.shape) for part in gathered] == [(3, 2), (1,)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda rank: torch.ones(2, 2 + rank), "in the first dimension only"),
        (lambda rank: torch.ones(2, dtype=torch.float64 if rank else torch.float32), "in the first dimension only"),
        (lambda rank: ["a name"], "got a str"),
        (lambda rank: {f"key {rank}": torch.ones(1)}, "rank 1 at .*key 1"),
    ],
)
def test_gather_rejects_what_it_cannot_concatenate(values: Callable[[int], Any], message: str) -> None:
    def gather() -> str:
        trainer = Trainer(**tiny_parts())
        with pytest.raises(DataError, match=message):
            trainer.gather(values(trainer.distributed.rank))
        return str(trainer.gather(torch.tensor([trainer.distributed.rank])).tolist())

    assert run_ranks(gather, 2) == ["[0, 1]"] * 2


# ---- rank 0 first, or alone


def run_main_process_first() -> tuple[list[float], int | None, str]:
    trainer = Trainer(**tiny_parts())
    passed: list[float] = []
    for local in (False, True):
        with trainer.main_process_first(local=local):
            if trainer.distributed.rank == 0:
                time.sleep(0.3)
            passed.append(time.monotonic())
    name = trainer.on_main_process(len)
    return passed, name("four"), str(trainer.distributed.rank)


def test_the_main_process_runs_a_block_first_and_a_function_alone() -> None:
    (first, alone, _), *others = run_ranks(run_main_process_first, 3)
    assert alone == 4
    for passed, nothing, _ in others:
        assert nothing is None
        assert all(later > earlier for earlier, later in zip(first, passed, strict=True))


def test_an_error_on_the_main_process_is_raised_on_all_which_can_continue() -> None:
    def fail_first() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())

        def go() -> None:
            with trainer.main_process_first():
                if trainer.distributed.rank == 0:
                    raise FileNotFoundError("no such archive")

        outcome = call_and_catch(go)
        trainer.train(tiny_data(), num_epochs=1)
        return outcome

    (kind, _, _), (others_kind, message, _) = run_ranks(fail_first, 2)
    assert (kind, others_kind) == ("FileNotFoundError", "RankFailedError")
    assert "rank 0 failed in main_process_first() (test_rendezvous.py:" in message
    assert "no such archive" in message


# ---- a call that only one process makes


class Alone(Callback[TrainerCore]):
    """Calls a collective on one rank only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if trainer.distributed.rank == self.rank and step.step == 2:
            trainer.gather(torch.ones(1))


def gather_alone_in_a_run(rank: int) -> tuple[str, str, float]:
    trainer = Trainer(**tiny_parts(), callbacks=[Alone(rank)])
    return call_and_catch(lambda: trainer.train(tiny_data(24), num_epochs=9, per_device_batch_size=4))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_collective_on_one_rank_of_a_run_raises(rank: int) -> None:
    results = run_ranks(gather_alone_in_a_run, 2, rank, timeout=30)
    kind, message, _ = results[rank]
    assert kind == "CollectiveError"
    assert f"gather() was called on rank {rank} (test_rendezvous.py:" in message
    assert f"rank {1 - rank} continued without it" in message
    kind, message, _ = results[1 - rank]
    assert kind == "RankFailedError"
    assert f"rank {rank} failed in gather(): CollectiveError: gather()" in message
    assert all(seconds < SECONDS for *_, seconds in results)


def differ() -> tuple[str, str, float]:
    trainer = Trainer(**tiny_parts())
    outcome = call_and_catch(
        lambda: trainer.evaluate(tiny_data()) if trainer.distributed.rank == 0 else trainer.predict(tiny_data())
    )
    trainer.evaluate(tiny_data())
    return outcome


def test_two_different_calls_at_one_point_raise_and_ranks_can_continue() -> None:
    for rank, (kind, message, seconds) in enumerate(run_ranks(differ, 2, timeout=30)):
        assert (kind, seconds < SECONDS) == ("CollectiveError", True)
        own, other = ("evaluate()", "predict()") if rank == 0 else ("predict()", "evaluate()")
        samples = "with 24 samples in global batches of 16"
        assert message.startswith(f"{own} {samples} was called on rank {rank} (test_rendezvous.py:")
        assert f"{other} {samples} on rank {1 - rank}" in message


def leave_alone() -> tuple[str, str, float]:
    trainer = Trainer(**tiny_parts())
    trainer.train(tiny_data(), num_epochs=1)
    if trainer.distributed.rank == 1:
        os._exit(0)
    return call_and_catch(lambda: trainer.evaluate(tiny_data()))


def test_a_collective_after_the_other_process_ended_raises() -> None:
    ((kind, message, seconds),) = run_ranks(leave_alone, 2, timeout=30, may_die={1})
    assert (kind, seconds < SECONDS) == ("RankFailedError", True)
    assert "lost: its process has ended" in message


def wait_for_a_slow_rank() -> float:
    trainer = Trainer(**tiny_parts())
    if trainer.distributed.rank == 1:
        time.sleep(2)  # a rank may be busy for any time
    return float(trainer.gather(torch.ones(1)).sum())


def test_a_slow_rank_is_awaited() -> None:
    assert run_ranks(wait_for_a_slow_rank, 2, timeout=30) == [2.0, 2.0]


# ---- errors of one process in the set-up


def an_empty_dataset(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24 if rank == 0 else 0), 1, {}


def no_epochs(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24), 1 - rank, {}


def another_loader(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24), 1, {"train_dataloader_kwargs": {"num_workers": -rank}}


@pytest.mark.parametrize("setting", [an_empty_dataset, no_epochs, another_loader])
def test_an_error_in_the_set_up_is_raised_on_all_ranks_which_can_continue(setting: Callable[[int], Any]) -> None:
    def train() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())
        data, num_epochs, options = setting(trainer.distributed.rank)
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        outcome = call_and_catch(lambda: trainer.train(data, num_epochs=num_epochs, **options))
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        trainer.train(tiny_data(24), num_epochs=1)
        return outcome

    (kind, message, seconds), (own_kind, own_message, _) = run_ranks(train, 2, timeout=30)
    assert (kind, seconds < SECONDS) == ("RankFailedError", True)
    assert own_kind in ("DataError", "OptionError", "ValueError")
    assert f"{own_kind}: {own_message}" in message


def freeze_on_rank_1() -> str:
    trainer = Trainer(**tiny_parts())
    if trainer.distributed.rank == 1:
        trainer.model.requires_grad_(False)
    with pytest.raises((ModelError, RankFailedError)) as caught:
        trainer.train(tiny_data(24), num_epochs=1)
    return type(caught.value).__name__


def test_a_model_that_one_rank_cannot_train_raises_on_all() -> None:
    assert run_ranks(freeze_on_rank_1, 2, timeout=30) == ["RankFailedError", "ModelError"]


# ---- the same, at every place of a run


class AloneAt(Trainer):
    """Calls a collective on one rank only, at one place of a run."""

    place: str
    rank: int

    def call_at(self, place: str) -> None:
        is_here = (place, self.rank) == (self.place, self._distributed.rank) and self.is_running
        if is_here and self.progress.steps >= 1:
            self.gather(torch.ones(1))

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.call_at("train_step")
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.call_at("eval_step")
        return super().eval_step(batch)

    @override
    def on_step_start(self) -> None:
        super().on_step_start()
        self.call_at("on_step_start")

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        self.call_at("on_gradients_ready")

    @override
    def on_evaluation_start(self, name: str) -> None:
        super().on_evaluation_start(name)
        self.call_at("on_evaluation_start")

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self.call_at("on_evaluation_end")

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self.call_at("on_epoch_start")

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        self.call_at("on_epoch_end")

    @override
    def on_run_end(self) -> None:
        super().on_run_end()
        self.call_at("on_run_end")


PLACES = [
    "train_step",
    "eval_step",
    "on_step_start",
    "on_gradients_ready",
    "on_evaluation_start",
    "on_evaluation_end",
    "on_epoch_start",
    "on_epoch_end",
    "on_run_end",
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_collective_on_one_rank_raises_at_every_place(place: str, rank: int) -> None:
    def train() -> tuple[str, str, float]:
        trainer = AloneAt(**tiny_parts(), place=place, rank=rank)
        return call_and_catch(
            lambda: trainer.train(tiny_data(24), tiny_data(24), num_epochs=3, per_device_batch_size=4)
        )

    results = run_ranks(train, 2, timeout=30)
    assert results[rank][0] == "CollectiveError"
    assert "gather() was called on rank" in results[rank][1]
    assert results[1 - rank][0] == ("nothing" if place == "on_run_end" else "RankFailedError")
    assert all(seconds < SECONDS for *_, seconds in results)


def call_alone_twice() -> list[str]:
    trainer = Trainer(**tiny_parts())
    outcomes = [call_and_catch(lambda: trainer.gather(torch.ones(1)))[0]] if trainer.distributed.rank == 0 else []
    if trainer.distributed.rank == 1:
        trainer._distributed.count_progress()  # noqa: SLF001  # as every step and batch does
        time.sleep(1)
    return [*outcomes, call_and_catch(lambda: trainer.gather(torch.ones(1)))[0]]


def test_after_a_failed_call_ranks_do_not_read_stale_records() -> None:
    assert run_ranks(call_alone_twice, 2, timeout=30) == [["CollectiveError", "RankFailedError"], ["RankFailedError"]]


def nest(raises: bool) -> list[str]:
    trainer = Trainer(**tiny_parts())
    order: list[str] = []

    def go() -> None:
        with trainer.main_process_first():
            with trainer.main_process_first():
                if trainer.distributed.rank == 0 and raises:
                    raise FileNotFoundError("no such archive")
            order.append(f"in {time.monotonic()}")

    kind, *_ = call_and_catch(go)
    return [*order, kind]


def test_a_nested_main_process_first_keeps_the_order() -> None:
    (first, _), (second, _) = run_ranks(nest, 2, False, timeout=30)
    assert float(first.split()[1]) < float(second.split()[1])
    assert run_ranks(nest, 2, True, timeout=30) == [["FileNotFoundError"], ["RankFailedError"]]


# ---- what must be the same on all ranks


@pytest.mark.parametrize(
    ("samples", "options", "parts"),
    [
        ((24, 40), ({}, {}), ("train 24 samples", "train 40 samples")),
        ((24, 24), ({"per_device_batch_size": 4}, {}), ("global batches of 8", "global batches of 16")),
        ((24, 24), ({"num_epochs": 1}, {"num_epochs": 2}), ("num_epochs=1", "num_epochs=2")),
        ((24, 24), ({"evaluate_every": Steps(1)}, {}), ("evaluate_every=Steps(n=1)", "evaluate_every=Epochs(n=1)")),
    ],
)
def test_data_and_options_that_differ_raise(samples: Any, options: Any, parts: tuple[str, str]) -> None:
    def train() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())
        rank = trainer.distributed.rank
        asked: Any = {"num_epochs": 1, **options[rank]}
        outcome = call_and_catch(lambda: trainer.train(tiny_data(samples[rank]), **asked))
        trainer.train(tiny_data(), num_epochs=1)
        return outcome

    for kind, message, _ in run_ranks(train, 2, timeout=30):
        assert kind == "CollectiveError"
        assert all(part in message for part in parts)


def test_evaluation_data_that_differs_raises() -> None:
    def evaluate() -> str:
        trainer = Trainer(**tiny_parts())
        return call_and_catch(lambda: trainer.evaluate(tiny_data(8 + 16 * trainer.distributed.rank)))[1]

    assert all("8 samples" in message and "24 samples" in message for message in run_ranks(evaluate, 2, timeout=30))
