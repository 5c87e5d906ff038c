"""What all processes call, they call together; a call that one of them makes alone is refused by name."""

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


def error_of(call: Callable[[], object]) -> tuple[str, str, float]:
    """Return what a call raised: its kind, its message, and the seconds it took."""
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


def test_gather_puts_ragged_and_nested_tensors_together() -> None:
    for gathered in run_ranks(gather_ragged, 3):
        assert gathered["rows"].tolist() == [[10.0, 11.0], [20.0, 21.0], [22.0, 23.0]]
        assert gathered["nested"][0].tolist() == [0.0, 1.0, 2.0]
        assert gathered["nested"][1][0].tolist() == [False, False, True, True, True, True]


def test_gather_on_one_process_gives_what_it_was_given() -> None:
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
def test_gather_refuses_what_it_cannot_put_together(values: Callable[[int], Any], message: str) -> None:
    def gather() -> str:
        trainer = Trainer(**tiny_parts())
        with pytest.raises(DataError, match=message):
            trainer.gather(values(trainer.distributed.rank))
        return str(trainer.gather(torch.tensor([trainer.distributed.rank])).tolist())

    assert run_ranks(gather, 2) == ["[0, 1]"] * 2


# ---- rank 0 first, or alone


def go_one_after_the_other() -> tuple[list[float], int | None, str]:
    trainer = Trainer(**tiny_parts())
    passed: list[float] = []
    for local in (False, True):
        with trainer.main_process_first(local=local):
            if trainer.distributed.rank == 0:
                time.sleep(0.3)
            passed.append(time.monotonic())
    name = trainer.on_main_process(len)
    return passed, name("four"), str(trainer.distributed.rank)


def test_the_main_process_goes_first_and_does_some_things_alone() -> None:
    (first, alone, _), *others = run_ranks(go_one_after_the_other, 3)
    assert alone == 4
    for passed, nothing, _ in others:
        assert nothing is None
        assert all(later > earlier for earlier, later in zip(first, passed, strict=True))


def test_what_fails_on_the_main_process_fails_on_all_and_they_go_on() -> None:
    def fail_first() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())

        def go() -> None:
            with trainer.main_process_first():
                if trainer.distributed.rank == 0:
                    raise FileNotFoundError("no such archive")

        outcome = error_of(go)
        trainer.train(tiny_data(), num_epochs=1)
        return outcome

    (kind, _, _), (others_kind, message, _) = run_ranks(fail_first, 2)
    assert (kind, others_kind) == ("FileNotFoundError", "RankFailedError")
    assert "rank 0 failed in main_process_first() (test_rendezvous.py:" in message
    assert "no such archive" in message


# ---- a call that one process makes alone


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
    return error_of(lambda: trainer.train(tiny_data(24), num_epochs=9, per_device_batch_size=4))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_collective_on_one_rank_of_a_run_is_refused_by_name(rank: int) -> None:
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
    outcome = error_of(
        lambda: trainer.evaluate(tiny_data()) if trainer.distributed.rank == 0 else trainer.predict(tiny_data())
    )
    trainer.evaluate(tiny_data())
    return outcome


def test_two_calls_at_one_place_are_refused_by_name_and_they_can_go_on() -> None:
    for rank, (kind, message, seconds) in enumerate(run_ranks(differ, 2, timeout=30)):
        assert (kind, seconds < SECONDS) == ("CollectiveError", True)
        mine, theirs = ("evaluate()", "predict()") if rank == 0 else ("predict()", "evaluate()")
        samples = "with 24 samples in global batches of 16"
        assert message.startswith(f"{mine} {samples} was called on rank {rank} (test_rendezvous.py:")
        assert f"{theirs} {samples} on rank {1 - rank}" in message


def leave_alone() -> tuple[str, str, float]:
    trainer = Trainer(**tiny_parts())
    trainer.train(tiny_data(), num_epochs=1)
    if trainer.distributed.rank == 1:
        os._exit(0)
    return error_of(lambda: trainer.evaluate(tiny_data()))


def test_a_collective_that_outlives_its_peers_is_refused_by_name() -> None:
    ((kind, message, seconds),) = run_ranks(leave_alone, 2, timeout=30, may_die={1})
    assert (kind, seconds < SECONDS) == ("RankFailedError", True)
    assert "lost: its process has ended" in message


def wait_for_a_slow_peer() -> float:
    trainer = Trainer(**tiny_parts())
    if trainer.distributed.rank == 1:
        time.sleep(2)  # long work of its own is no mistake, however long
    return float(trainer.gather(torch.ones(1)).sum())


def test_nobody_is_given_up_for_being_slow() -> None:
    assert run_ranks(wait_for_a_slow_peer, 2, timeout=30) == [2.0, 2.0]


# ---- what one process cannot set up


def an_empty_dataset(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24 if rank == 0 else 0), 1, {}


def no_epochs(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24), 1 - rank, {}


def another_loader(rank: int) -> tuple[TensorDataset, int, dict[str, Any]]:
    return tiny_data(24), 1, {"train_dataloader_kwargs": {"num_workers": -rank}}


@pytest.mark.parametrize("setting", [an_empty_dataset, no_epochs, another_loader])
def test_what_is_refused_on_one_rank_is_refused_on_all_and_they_can_go_on(setting: Callable[[int], Any]) -> None:
    def train() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())
        data, num_epochs, options = setting(trainer.distributed.rank)
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        outcome = error_of(lambda: trainer.train(data, num_epochs=num_epochs, **options))
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


def test_a_model_that_only_one_rank_cannot_train_is_refused_on_all() -> None:
    assert run_ranks(freeze_on_rank_1, 2, timeout=30) == ["RankFailedError", "ModelError"]


# ---- the same, at every place of a run


class AloneAt(Trainer):
    """Calls a collective on one rank only, at a place of a run."""

    place: str
    rank: int

    def come_to(self, place: str) -> None:
        is_here = (place, self.rank) == (self.place, self._distributed.rank) and self.is_running
        if is_here and self.progress.steps >= 1:
            self.gather(torch.ones(1))

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.come_to("train_step")
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        self.come_to("eval_step")
        return super().eval_step(batch)

    @override
    def on_step_start(self) -> None:
        super().on_step_start()
        self.come_to("on_step_start")

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        self.come_to("on_gradients_ready")

    @override
    def on_evaluation_start(self, name: str) -> None:
        super().on_evaluation_start(name)
        self.come_to("on_evaluation_start")

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self.come_to("on_evaluation_end")

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self.come_to("on_epoch_start")

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        self.come_to("on_epoch_end")

    @override
    def on_run_end(self) -> None:
        super().on_run_end()
        self.come_to("on_run_end")


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
def test_a_collective_on_one_rank_is_refused_wherever_it_is(place: str, rank: int) -> None:
    def train() -> tuple[str, str, float]:
        trainer = AloneAt(**tiny_parts(), place=place, rank=rank)
        return error_of(lambda: trainer.train(tiny_data(24), tiny_data(24), num_epochs=3, per_device_batch_size=4))

    results = run_ranks(train, 2, timeout=30)
    assert results[rank][0] == "CollectiveError"
    assert "gather() was called on rank" in results[rank][1]
    assert results[1 - rank][0] == ("nothing" if place == "on_run_end" else "RankFailedError")
    assert all(seconds < SECONDS for *_, seconds in results)


def refuse_and_go_on() -> list[str]:
    trainer = Trainer(**tiny_parts())
    outcomes = [error_of(lambda: trainer.gather(torch.ones(1)))[0]] if trainer.distributed.rank == 0 else []
    if trainer.distributed.rank == 1:
        trainer._distributed.count_progress()  # noqa: SLF001  # as every step and batch does
        time.sleep(1)
    return [*outcomes, error_of(lambda: trainer.gather(torch.ones(1)))[0]]


def test_after_a_call_alone_the_processes_do_not_go_on_with_stale_words() -> None:
    assert run_ranks(refuse_and_go_on, 2, timeout=30) == [["CollectiveError", "RankFailedError"], ["RankFailedError"]]


def nest(raises: bool) -> list[str]:
    trainer = Trainer(**tiny_parts())
    order: list[str] = []

    def go() -> None:
        with trainer.main_process_first():
            with trainer.main_process_first():
                if trainer.distributed.rank == 0 and raises:
                    raise FileNotFoundError("no such archive")
            order.append(f"in {time.monotonic()}")

    kind, *_ = error_of(go)
    return [*order, kind]


def test_what_is_within_main_process_first_has_its_order() -> None:
    (first, _), (second, _) = run_ranks(nest, 2, False, timeout=30)
    assert float(first.split()[1]) < float(second.split()[1])
    assert run_ranks(nest, 2, True, timeout=30) == [["FileNotFoundError"], ["RankFailedError"]]


# ---- what has to be the same on all


@pytest.mark.parametrize(
    ("samples", "options", "told"),
    [
        ((24, 40), ({}, {}), ("train 24 samples", "train 40 samples")),
        ((24, 24), ({"per_device_batch_size": 4}, {}), ("global batches of 8", "global batches of 16")),
        ((24, 24), ({"num_epochs": 1}, {"num_epochs": 2}), ("num_epochs=1", "num_epochs=2")),
        ((24, 24), ({"evaluate_every": Steps(1)}, {}), ("evaluate_every=Steps(n=1)", "evaluate_every=Epochs(n=1)")),
    ],
)
def test_data_and_options_that_differ_are_refused(samples: Any, options: Any, told: tuple[str, str]) -> None:
    def train() -> tuple[str, str, float]:
        trainer = Trainer(**tiny_parts())
        rank = trainer.distributed.rank
        asked: Any = {"num_epochs": 1, **options[rank]}
        outcome = error_of(lambda: trainer.train(tiny_data(samples[rank]), **asked))
        trainer.train(tiny_data(), num_epochs=1)
        return outcome

    for kind, message, _ in run_ranks(train, 2, timeout=30):
        assert kind == "CollectiveError"
        assert all(part in message for part in told)


def test_evaluation_data_that_differs_is_refused() -> None:
    def evaluate() -> str:
        trainer = Trainer(**tiny_parts())
        return error_of(lambda: trainer.evaluate(tiny_data(8 + 16 * trainer.distributed.rank)))[1]

    assert all("8 samples" in message and "24 samples" in message for message in run_ranks(evaluate, 2, timeout=30))
