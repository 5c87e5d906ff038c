"""Failures and stops of several ranks: precedence, errors, and the state afterwards. See also `test_events.py`."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    DataLoaderConfig,
    DDPMixin,
    EvalResult,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.distributed.failure import close_for_sending, open_connections
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.engines.base import Engine, OptimizerSlot
from ptacc.errors import RankFailedError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Failing(Trainer):
    """Fails on one rank, in its fourth step."""

    rank: int = 0

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if (self._distributed.rank, self.progress.steps) == (self.rank, 3):
            raise KeyError("on purpose")
        return super().train_step(batch)


class Calling(Callback[TrainerCore]):
    """Calls one function at the end of step 2, and another at the end of the run."""

    def __init__(
        self,
        in_step_2: Callable[[TrainerCore], None] = lambda trainer: None,
        at_the_end: Callable[[TrainerCore], None] = lambda trainer: None,
    ) -> None:
        self.in_step_2, self.at_the_end = in_step_2, at_the_end

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == 2:
            self.in_step_2(trainer)

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.at_the_end(trainer)


def terminate(trainer: TrainerCore) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def request_stop(trainer: TrainerCore) -> None:
    trainer.stop("enough")


def on_rank_1(act: Callable[[TrainerCore], None]) -> Callable[[TrainerCore], None]:
    def act_there(trainer: TrainerCore) -> None:
        if trainer.distributed.rank == 1:
            act(trainer)

    return act_there


def how_it_ended(callback: Calling, **options: Any) -> tuple[object, str | None, int]:
    trainer = Trainer(**tiny_parts(), callbacks=[callback])
    code: object = None
    try:
        trainer.train(tiny_data(24), num_epochs=9, **options)
    except SystemExit as error:
        code = error.code
    return code, trainer.history.stop_reason, trainer.progress.steps


def test_a_signal_takes_precedence_over_a_stop_request_of_a_lower_rank() -> None:
    def train() -> tuple[object, str | None, int]:
        def act(trainer: TrainerCore) -> None:
            request_stop(trainer)
            on_rank_1(terminate)(trainer)

        return how_it_ended(Calling(act), per_device_batch_size=2, stop_check_every=2)

    assert run_ranks(train, 2, timeout=30) == [(143, "SIGTERM on rank 1", 3)] * 2


def test_a_signal_is_applied_while_the_run_stops() -> None:
    assert how_it_ended(Calling(request_stop, at_the_end=terminate)) == (143, "SIGTERM on rank 0", 2)


def test_a_signal_after_the_last_vote_ends_its_own_process() -> None:
    def train() -> tuple[object, str | None, int]:
        return how_it_ended(Calling(at_the_end=on_rank_1(terminate)))

    assert run_ranks(train, 2, timeout=30) == [(None, None, 18), (143, "SIGTERM on rank 1", 18)]


def test_a_due_evaluation_runs_although_ranks_request_a_stop() -> None:
    def train() -> tuple[str | None, int, list[float | None]]:
        trainer = Trainer(**tiny_parts(), callbacks=[Calling(on_rank_1(request_stop))])
        history = trainer.train(
            tiny_data(24),
            tiny_data(24),
            num_epochs=9,
            per_device_batch_size=2,
            stop_check_every=2,
            evaluate_every=Steps(2),
        )
        return history.stop_reason, trainer.progress.steps, [epoch.eval_loss for epoch in history]

    (reason, steps, losses), other = run_ranks(train, 2, timeout=30)
    assert (reason, steps, losses) == other
    assert (reason, steps) == ("enough", 3)
    assert None not in losses


def test_a_users_own_handler_is_called_and_restored() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            Trainer(**tiny_parts(), callbacks=[Calling(terminate)]).train(tiny_data(24), num_epochs=9)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def fail_and_train_again() -> str:
    trainer = Failing(**tiny_parts(), rank=1)
    with pytest.raises((KeyError, RankFailedError)):
        trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=2)
    with pytest.raises(RankFailedError, match="cannot continue together"):
        trainer.train(tiny_data(24), num_epochs=1)
    return "refused"


def test_processes_that_failed_cannot_continue_together() -> None:
    assert run_ranks(fail_and_train_again, 2, timeout=30) == ["refused"] * 2


def errors_seen_by_a_callback() -> list[str]:
    errors: list[str] = []

    class Recording(Callback[TrainerCore]):
        @override
        def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
            errors.append(type(error).__name__)

        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            if trainer.distributed.rank == 1 and step.step == 2:
                raise KeyError("in a callback")

    trainer = Trainer(**tiny_parts(), callbacks=[Recording()])
    with pytest.raises((KeyError, RankFailedError)):
        trainer.train(tiny_data(24), num_epochs=2, per_device_batch_size=4)
    return errors


def test_callbacks_receive_the_error_of_their_own_rank_or_of_the_other() -> None:
    assert run_ranks(errors_seen_by_a_callback, 2, timeout=30) == [["RankFailedError"], ["KeyError"]]


def kind_and_message(train: Callable[[], object]) -> tuple[str, str]:
    try:
        train()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", ""


class Evaluating(Callback[Trainer]):
    """Evaluates at the end of a step, after a SIGTERM."""

    @override
    def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
        if step.step == 2:
            terminate(trainer)
            trainer.evaluate(tiny_data(240), per_device_batch_size=2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_is_applied_in_an_evaluation_that_a_callback_runs(world_size: int) -> None:
    def train() -> tuple[str, str]:
        trainer = Trainer(**tiny_parts(), callbacks=[Evaluating()])
        return kind_and_message(lambda: trainer.train(tiny_data(24), num_epochs=9, per_device_batch_size=2))

    assert run_ranks(train, world_size, timeout=30) == [("SystemExit", "143")] * world_size


class SlowEvaluation(Trainer):
    """Takes much longer for a batch of its evaluation than for a step."""

    signalled_at: float = 0.0

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        time.sleep(0.04)
        if self.evaluated == 30 and self._distributed.rank == 1:
            self.signalled_at = time.monotonic()
            terminate(self)
        self.evaluated += 1
        return super().eval_step(batch)

    evaluated: int = 0


def test_a_signal_is_applied_soon_where_evaluations_are_slow() -> None:
    def train() -> float:
        trainer = SlowEvaluation(**tiny_parts())
        with pytest.raises(SystemExit):
            trainer.train(
                tiny_data(240), tiny_data(400), max_steps=99, per_device_batch_size=1, evaluate_every=Steps(60)
            )
        return time.monotonic() - trainer.signalled_at

    assert run_ranks(train, 2, timeout=60)[1] < 2.0


class Raising(Failing):
    error: Exception

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        try:
            return super().train_step(batch)
        except KeyError:
            raise self.error from None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader timed out after 2.0 seconds"),
        RuntimeError("connection closed by server"),
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:41365"),
        RuntimeError("NCCL error: unhandled system error in process group"),
        ConnectionResetError("connection reset by peer"),
    ],
    ids=str,
)
def test_an_error_of_the_users_code_is_not_mistaken_for_a_broken_collective(error: Exception) -> None:
    def train() -> tuple[str, str]:
        trainer = Raising(**tiny_parts(), rank=1, error=error)
        return kind_and_message(lambda: trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=2))

    first, second = run_ranks(train, 2, timeout=30)
    assert second == (type(error).__name__, str(error))
    assert first == ("RankFailedError", f"rank 1 failed after step 3: {type(error).__name__}: {error}")


def fail_with_a_connection(*, is_initialized_before: bool) -> tuple[str, bytes]:
    """Fail on rank 0 with an own connection open. Return the error, and what the connection still transmits."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        if is_initialized_before:
            PartialState(cpu=True)
        with accepted:
            with pytest.raises((KeyError, RankFailedError)) as failed:
                Failing(**tiny_parts()).train(tiny_data(), num_epochs=9, per_device_batch_size=2)
            client.sendall(b"intact")
            return failed.typename, accepted.recv(6)


@pytest.mark.parametrize("is_initialized_before", [True, False])
def test_a_failure_closes_no_connection_of_the_user(is_initialized_before: bool) -> None:
    results = run_ranks(lambda: fail_with_a_connection(is_initialized_before=is_initialized_before), 2)
    assert results == [("KeyError", b"intact"), ("RankFailedError", b"intact")]


def test_the_other_end_of_a_connection_that_is_closed_for_sending_can_still_send() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            close_for_sending(client.fileno(), os.fstat(client.fileno()).st_ino)
            assert accepted.recv(1) == b""
            accepted.sendall(b"first")
            accepted.sendall(b"second")
            assert client.recv(11, socket.MSG_WAITALL) == b"firstsecond"


def wait_for_the_rank_before() -> None:
    distributed = Trainer(**tiny_parts()).distributed
    assert isinstance(distributed, DistributedRuntime)
    with distributed.propagate_failure("here"):
        if distributed.rank == 0:
            raise KeyError("on purpose")
        if distributed.rank == 1:
            distributed.sync("train()")
        dist.recv(torch.zeros(1), src=1, group=distributed.group)


def test_a_rank_that_finds_a_failure_in_a_rendezvous_interrupts_those_that_wait_for_it() -> None:
    def train() -> tuple[str, str]:
        return kind_and_message(wait_for_the_rank_before)

    found = ("RankFailedError", "rank 0 failed here: KeyError: 'on purpose'")
    assert run_ranks(train, 3, timeout=30) == [("KeyError", "'on purpose'"), found, found]


def test_failures_are_reported_with_a_second_accelerator_as_well() -> None:
    class Precise(AMPMixin, Failing): ...

    def train() -> tuple[str, str]:
        Trainer(**tiny_parts()).train(tiny_data(24), num_epochs=1)
        parts: dict[str, Any] = {**tiny_parts(), "model": nn.Linear(4, 2)}
        parts["optimizer"] = torch.optim.SGD(parts["model"].parameters(), lr=0.1)
        trainer = Precise(**parts, rank=1, mixed_precision="bf16")
        inputs, targets = tiny_data(24).tensors
        data = TensorDataset(inputs.float(), targets)
        return kind_and_message(lambda: trainer.train(data, num_epochs=1, per_device_batch_size=2))

    assert [kind for kind, _ in run_ranks(train, 2, timeout=30)] == ["RankFailedError", "KeyError"]


class ReducesInOwnGroup(Trainer):
    """Communicates in a group of its own. Rank 1 ends, and its connections in that group close first."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        before = open_connections()
        group = dist.new_group(list(range(dist.get_world_size())))
        if dist.get_rank() == 1:
            dist.all_reduce(torch.zeros(1), group=group)
            for descriptor, _ in open_connections() - before:
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.zeros(1), group=group)
        dist.all_reduce(torch.zeros(1), group=group)
        return super().train_step(batch)


def test_a_killed_rank_is_named_also_if_a_group_of_the_user_breaks_first() -> None:
    def train() -> tuple[str, str]:
        trainer = ReducesInOwnGroup(**tiny_parts())
        return kind_and_message(lambda: trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=4))

    [(kind, message)] = run_ranks(train, 2, timeout=30, may_die={1})
    assert (kind, "rank 1" in message) == ("RankFailedError", True)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 2, dtype=torch.float64) for _ in range(2)])
        self.head = 0

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = sum((head(inputs) for head in list(self.heads)[self.head :]), torch.zeros(()))
        return outputs


class SkippingHead(DDPMixin, Trainer):
    """Does not use one parameter, on one rank in one step."""

    step: int = 0

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        is_here = (self._distributed.rank, self.progress.steps + 1) == (1, self.step)
        self.unwrapped_model.head = int(is_here)  # type: ignore[assignment]
        return super().train_step(batch)


@pytest.mark.parametrize("step", [2, 3])
def test_with_ddp_a_parameter_unused_on_one_rank_is_found_before_the_update(step: int) -> None:
    def train() -> tuple[str, str, int]:
        model = TwoHeads()
        parts: dict[str, Any] = {**tiny_parts(), "model": model}
        parts["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = SkippingHead(**parts, step=step)
        kind, message = kind_and_message(lambda: trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=4))
        return kind, message, trainer.progress.steps

    for kind, message, steps in run_ranks(train, 2, timeout=30):
        assert kind in ("RuntimeError", "RankFailedError")
        assert "finished reduction" in message
        assert steps == step - 1


class FailingHook(Trainer):
    """Fails in a hook on one rank."""

    failing_hook: str

    def fail_in(self, hook: str) -> None:
        if (hook, self._distributed.rank) == (self.failing_hook, 1):
            raise KeyError("on purpose")

    @override
    def optimizer_slots(self) -> tuple[OptimizerSlot, ...]:
        self.fail_in("slots")
        return super().optimizer_slots()

    @override
    def make_seed(self) -> int:
        self.fail_in("make_seed")
        return super().make_seed()

    @override
    def make_engine(self) -> Engine:
        self.fail_in("make_engine")
        return super().make_engine()

    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        self.fail_in("make_train_dataloader")
        return super().make_train_dataloader(request)

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self.fail_in("on_evaluation_end")


@pytest.mark.parametrize("hook", ["slots", "make_seed", "make_engine", "make_train_dataloader", "on_evaluation_end"])
def test_a_hook_that_fails_on_one_rank_is_named_on_the_other(hook: str) -> None:
    def train() -> tuple[str, str]:
        trainer = FailingHook(**tiny_parts(), failing_hook=hook)
        return kind_and_message(lambda: trainer.train(tiny_data(24), tiny_data(24), num_epochs=1))

    first, second = run_ranks(train, 2, timeout=30)
    assert second == ("KeyError", "'on purpose'")
    assert first[0] == "RankFailedError"
    assert "rank 1 failed" in first[1]
    assert "KeyError: 'on purpose'" in first[1]
