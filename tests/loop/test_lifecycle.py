"""The events of a run, their order, and what a run restores at its end."""

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    EpochRecord,
    Epochs,
    EvalResult,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
)
from ptacc.errors import NoRunError, OptionError
from ptacc.protocols import Precision
from ptacc.testing import tiny_data, tiny_parts


class EventLog(Callback[TrainerCore]):
    def __init__(self) -> None:
        self.lines: list[str] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.lines.append("run")

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.lines.append("run over")

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self.lines.append(f"epoch after {trainer.progress.epochs}")

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self.lines.append(f"epoch {record.epoch} over, {trainer.progress.epochs} complete")

    @override
    def on_step_start(self, trainer: TrainerCore) -> None:
        self.lines.append(f"step after {trainer.progress.steps}")

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self.lines.append(f"step {step.step} over, {trainer.progress.steps} complete")

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        self.lines.append(f"evaluated {name}".rstrip())

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        self.lines.append(f"{type(error).__name__}")


class Failing(Trainer):
    fails_in: str = "train"

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.fails_in == "train" and self.progress.steps == 1:
            raise KeyError("on purpose")
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.fails_in == "eval":
            raise KeyError("on purpose")
        return super().eval_step(batch)


def parts_with(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"model": model, "loss_func": nn.CrossEntropyLoss(), "optimizer": optimizer, "default_callbacks": ()}


def test_events_come_in_order_and_counts_are_of_completed_things() -> None:
    log = EventLog()
    trainer = Trainer(**tiny_parts(), callbacks=[log])
    trainer.train(tiny_data(16), tiny_data(8), num_epochs=1)
    assert log.lines == [
        "run",
        "epoch after 0",
        "step after 0",
        "step 1 over, 1 complete",
        "step after 1",
        "step 2 over, 2 complete",
        "evaluated",
        "epoch 1 over, 1 complete",
        "run over",
    ]


@pytest.mark.parametrize(
    ("cadence", "steps"), [(Steps(2), [2, 4, 6]), (Steps(4), [4, 6]), (Epochs(1), [3, 6]), (Epochs(2), [6])]
)
def test_evaluation_follows_its_cadence_and_ends_the_run(cadence: Steps | Epochs, steps: list[int]) -> None:
    log = EventLog()
    trainer = Trainer(**tiny_parts(), callbacks=[log])
    trainer.train(tiny_data(24), tiny_data(8), num_epochs=2, evaluate_every=cadence)
    before = [line for line, following in zip(log.lines, log.lines[1:], strict=False) if following == "evaluated"]
    assert [int(line.split()[1]) for line in before] == steps


def test_evaluation_before_the_first_step_is_recorded_separately() -> None:
    log = EventLog()
    trainer = Trainer(**tiny_parts(), callbacks=[log])
    history = trainer.train(tiny_data(), {"a": tiny_data(8), "b": tiny_data(9)}, max_steps=1, evaluate_first=True)
    assert log.lines[1:3] == ["evaluated a", "evaluated b"]
    assert set(history.initial) == {"a", "b"}
    assert set(history[0].evaluations) == {"a", "b"}


@pytest.mark.parametrize(("steps", "epochs", "complete"), [(6, 2, True), (5, 1, False), (3, 1, True)])
def test_max_steps_ends_within_an_epoch(steps: int, epochs: int, complete: bool) -> None:
    trainer = Trainer(**tiny_parts())
    history = trainer.train(tiny_data(24), max_steps=steps)
    assert (trainer.progress.steps, trainer.progress.epochs, history[-1].is_complete) == (steps, epochs, complete)


def test_whichever_limit_comes_first_ends_the_run() -> None:
    trainer = Trainer(**tiny_parts())
    assert trainer.train(tiny_data(24), num_epochs=1, max_steps=100)[-1].step == 3
    assert trainer.train(tiny_data(24), num_epochs=9, max_steps=4)[-1].step == 4


def test_max_time_ends_the_run_and_says_so() -> None:
    history = Trainer(**tiny_parts()).train(tiny_data(), max_time=0.05)
    assert history.stop_reason == "max_time=0.05 reached"


def test_a_run_that_its_limit_ended_is_evaluated() -> None:
    history = Trainer(**tiny_parts()).train(tiny_data(), tiny_data(), max_time=0.05, evaluate_every=Epochs(10**9))
    assert history[-1].eval_loss is not None


def test_an_evaluation_that_is_due_after_a_stop_request_is_made() -> None:
    class Enough(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            trainer.stop("enough")

    trainer = Trainer(**tiny_parts(), callbacks=[Enough()])
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=5, evaluate_every=Steps(1))
    assert (history.stop_reason, history[-1].step, history[-1].eval_loss is None) == ("enough", 1, False)


def test_limit_batches_sizes_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(**tiny_parts())
    assert trainer.train(tiny_data(24), num_epochs=3, limit_batches=2)[-1].step == 6
    monkeypatch.setenv("PTACC_LIMIT_BATCHES", "1")
    assert trainer.train(tiny_data(24), num_epochs=3)[-1].step == 3
    assert trainer.run.plan.total_steps == 3


def test_an_invalid_limit_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTACC_LIMIT_BATCHES", "two")
    with pytest.raises(OptionError, match="PTACC_LIMIT_BATCHES='two': must be a whole number of batches"):
        Trainer(**tiny_parts()).train(tiny_data(), num_epochs=1)


def test_limit_batches_takes_the_first_batches_of_an_evaluation_and_of_predictions() -> None:
    trainer, data = Trainer(**tiny_parts()), tiny_data(12)
    first = Subset(data, range(8))
    assert trainer.evaluate(data, per_device_batch_size=4, limit_batches=2) == trainer.evaluate(first)
    assert len(trainer.predict(data, per_device_batch_size=4, limit_batches=2)) == 8


def test_a_callback_stops_the_run_with_its_reason() -> None:
    class Enough(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            if step.step == 2:
                trainer.stop("enough")

    history = Trainer(**tiny_parts(), callbacks=[Enough(), Enough()]).train(tiny_data(), num_epochs=5)
    assert (history.stop_reason, history[-1].step, history[-1].is_complete) == ("enough", 2, False)


def test_a_mixin_stops_the_run_with_its_reason() -> None:
    class ThreeSteps(Trainer):
        @override
        def should_stop(self) -> str | None:
            return super().should_stop() or ("three" if self.progress.steps == 3 else None)

    history = ThreeSteps(**tiny_parts()).train(tiny_data(24), num_epochs=5)
    assert (history.stop_reason, history[-1].step) == ("three", 3)


@pytest.mark.parametrize("fails_in", ["train", "eval"])
def test_an_exception_is_reported_and_raised_and_the_model_restored(fails_in: str) -> None:
    log, model = EventLog(), nn.Sequential(nn.Linear(4, 2).double(), nn.Dropout(0.1))
    model[1].eval()
    trainer = Failing(**parts_with(model), callbacks=[log], fails_in=fails_in)
    with pytest.raises(KeyError, match="on purpose"):
        trainer.train(tiny_data(24), tiny_data(8), num_epochs=1, evaluate_first=fails_in == "eval")
    assert log.lines[-1] == "KeyError"
    assert trainer.model is model
    assert [module.training for module in model.modules()] == [True, True, False]


def test_train_flags_survive_an_evaluation_within_an_epoch() -> None:
    flags: list[bool] = []

    class Frozen(Trainer):
        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.model.get_submodule("1").eval()

        @override
        def on_step_start(self) -> None:
            super().on_step_start()
            flags.extend(module.training for module in self.model.modules())

    model = nn.Sequential(nn.Linear(4, 2).double(), nn.Dropout(0.1))
    Frozen(**parts_with(model)).train(tiny_data(24), tiny_data(8), num_epochs=1, evaluate_every=Steps(1))
    assert flags == [True, True, False] * 3


def test_the_model_is_unpatched_after_a_run_in_bf16() -> None:
    class Half(AMPMixin, Trainer):
        mixed_precision: Precision | None = "bf16"

    model = nn.Linear(4, 2)
    before = set(vars(model))
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    trainer = Half(**parts_with(model))
    trainer.train(data, num_epochs=1)
    trainer.evaluate(data)
    assert set(vars(model)) == before
    assert model(torch.randn(2, 4)).dtype == torch.float32


def test_an_evaluation_restores_the_random_streams_of_training() -> None:
    class Drawing(Trainer):
        @override
        def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            torch.rand(1)
            return super().eval_step(batch)

    def weights(eval_data: TensorDataset | None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2).double(), nn.Dropout(0.5))
        Drawing(**parts_with(model)).train(
            tiny_data(), eval_data, num_epochs=2, train_dataloader_kwargs={"shuffle": False}
        )
        return next(model.parameters()).detach()

    assert torch.equal(weights(None), weights(tiny_data()))


def test_nothing_draws_from_the_global_generators() -> None:
    trainer = Trainer(**tiny_parts())
    state = torch.get_rng_state()
    trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    trainer.evaluate(tiny_data())
    trainer.predict(tiny_data())
    assert torch.equal(torch.get_rng_state(), state)


class Released(Trainer):
    """Records whether a batch's outputs are still in memory in its backward pass."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        self.seen = weakref.ref(output.outputs)
        return output

    @override
    def backward(self, loss: Tensor) -> None:
        in_memory.append(self.seen() is not None)
        super().backward(loss)

    seen: Any = None


class WithBatchEnd(Released):
    @override
    def on_batch_end(self, batch: tuple[Tensor, Tensor], output: StepOutput[Tensor]) -> None:
        super().on_batch_end(batch, output)
        in_memory.append(output.outputs is self.seen())


in_memory: list[bool] = []


@pytest.mark.parametrize(("kind", "expected"), [(Released, {False}), (WithBatchEnd, {True})])
def test_unused_outputs_are_released_before_the_backward_pass(kind: type[Released], expected: set[bool]) -> None:
    in_memory.clear()
    kind(**tiny_parts()).train(tiny_data(), num_epochs=1)
    assert set(in_memory) == expected


def test_two_callbacks_of_one_class_both_get_events() -> None:
    logs = [EventLog(), EventLog()]
    Trainer(**tiny_parts(), callbacks=logs).train(tiny_data(), num_epochs=1)
    assert logs[0].lines == logs[1].lines != []


def test_a_callbacks_own_attribute_error_surfaces() -> None:
    class Broken(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            trainer.model.no_such_thing()  # type: ignore[operator]

    with pytest.raises(AttributeError, match="no_such_thing"):
        Trainer(**tiny_parts(), callbacks=[Broken()]).train(tiny_data(), num_epochs=1)


def test_around_hooks_surround_and_close_after_an_exception() -> None:
    lines: list[str] = []

    class Around(Failing):
        @override
        @contextmanager
        def around_step(self) -> Generator[None]:
            with super().around_step():
                lines.append("in")
                try:
                    yield
                finally:
                    lines.append("out")

    with pytest.raises(KeyError):
        Around(**tiny_parts()).train(tiny_data(), num_epochs=1)
    assert lines == ["in", "out", "in", "out"]


def test_history_before_the_first_run_is_an_error() -> None:
    with pytest.raises(NoRunError, match="call train"):
        _ = Trainer(**tiny_parts()).history


@pytest.mark.parametrize("target", [1, np.int64(1), np.asarray(1)], ids=["number", "scalar", "array"])
def test_samples_may_be_arrays_of_numpy(target: Any) -> None:
    history = Trainer(**tiny_parts()).train([(np.ones(4), target)] * 4, num_epochs=1)
    expected = nn.functional.cross_entropy(tiny_parts()["model"](torch.ones(4, 4).double()), torch.ones(4).long())
    assert history.steps[0].loss == expected.item()


def test_a_run_may_have_one_limit_of_two_that_are_given() -> None:
    assert Trainer(**tiny_parts()).train(tiny_data(), num_epochs=None, max_steps=2).steps[-1].step == 2
    with pytest.raises(OptionError, match="does not know when to end"):
        Trainer(**tiny_parts()).train(tiny_data(), num_epochs=None, max_steps=None)
