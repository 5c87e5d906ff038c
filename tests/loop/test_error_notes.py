"""An exception in a step, an evaluation or a prediction has a note that says where, and with which batch."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    ClosureMixin,
    EpochRecord,
    GradAccumMixin,
    Pair,
    StepOutput,
    StepResult,
    Trainer,
)
from ptacc.loop.error_notes import MARK
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

BATCH = ["  batch[0]: float64 (8, 4) on cpu", "  batch[1]: int64 (8,) on cpu"]
IN_ORDER: dict[str, Any] = {"train_dataloader_kwargs": {"shuffle": False}}


class FaultError(Exception): ...


class Faulty(GradAccumMixin, Trainer):
    """Raises in the method `fails_in`, in its call number `fails_at`."""

    fails_in: str = ""
    fails_at: int = 1
    error: BaseException | None = None
    calls: int = 0

    def fail(self, method: str) -> None:
        if method == self.fails_in:
            self.calls += 1
            if self.calls == self.fails_at:
                raise self.error or FaultError("on purpose")

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        self.fail("train_step")
        return super().train_step(batch)

    @override
    def backward(self, loss: Tensor) -> None:
        self.fail("backward")
        super().backward(loss)

    @override
    def on_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_batch_end(batch, output)
        self.fail("on_batch_end")

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        self.fail("on_gradients_ready")

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        self.fail("eval_step")
        return super().eval_step(batch)

    @override
    def predict_step(self, batch: Pair | Tensor) -> Tensor:
        self.fail("predict_step")
        return super().predict_step(batch)

    @override
    def compute_metrics(self) -> dict[str, float]:
        self.fail("compute_metrics")
        return super().compute_metrics()


class Listening(Callback[Faulty]):
    @override
    def on_step_start(self, trainer: Faulty) -> None:
        trainer.fail("on_step_start")

    @override
    def on_step_end(self, trainer: Faulty, step: StepResult) -> None:
        trainer.fail("on_step_end")

    @override
    def on_epoch_end(self, trainer: Faulty, record: EpochRecord) -> None:
        trainer.fail("on_epoch_end")


def notes_of(act: Callable[[], object], error: type[BaseException] = FaultError) -> list[str]:
    """Return the lines of the notes of the error that `act` raises."""
    with pytest.raises(error) as caught:
        act()
    notes = [note for note in getattr(caught.value, "__notes__", []) if note.startswith(MARK)]
    assert len(notes) <= 1
    return notes[0].splitlines() if notes else []


def train(fails_in: str, fails_at: int = 1, error: BaseException | None = None, **options: Any) -> list[str]:
    """Train two epochs of three steps, and return the lines of the note of the error."""
    error = error or FaultError("on purpose")
    trainer = Faulty(**tiny_parts(), fails_in=fails_in, fails_at=fails_at, error=error, callbacks=[Listening()])
    vars(trainer).update(options)
    return notes_of(lambda: trainer.train(tiny_data(), tiny_data(), num_epochs=2, **IN_ORDER), type(error))


@pytest.mark.parametrize("method", ["train_step", "backward", "on_batch_end"])
def test_the_note_has_the_step_the_batch_and_its_samples(method: str) -> None:
    place = "ptacc: raised in step 5 of training (epoch 2), batch 1 of 1, on rank 0 of 1"
    assert train(method, 5) == [place, *BATCH, "  indices of its samples: 8, 9, 10, 11, 12, 13, 14, 15"]


def test_the_note_has_the_number_of_the_batch_within_the_step() -> None:
    place, *_ = train("train_step", 2, gradient_accumulation_steps=3)
    assert place == "ptacc: raised in step 1 of training (epoch 1), batch 2 of 3, on rank 0 of 1"


@pytest.mark.parametrize("method", ["on_step_start", "on_gradients_ready", "on_step_end"])
def test_an_exception_of_a_hook_or_callback_within_a_step_has_the_number_of_the_step(method: str) -> None:
    place, *batch = train(method, 2)
    assert place == (
        "ptacc: raised in step 2 of training (epoch 1), outside of its forward and backward passes, on rank 0 of 1"
    )
    assert batch[:2] == BATCH


def test_an_exception_of_the_optimizer_has_a_note() -> None:
    class Broken(SGD):
        @override
        def step(self, closure: Any = None) -> Any:
            raise FaultError("on purpose")

    parts = tiny_parts()
    parts["optimizer"] = Broken(parts["model"].parameters(), lr=0.1)
    trainer = Trainer(**parts)
    assert "step 1 of training" in notes_of(lambda: trainer.train(tiny_data(), num_epochs=1))[0]


def test_a_step_by_a_closure_has_the_same_note() -> None:
    class ByClosure(ClosureMixin, Faulty): ...

    parts = tiny_parts()
    parts["optimizer"] = LBFGS(parts["model"].parameters(), max_iter=2)
    trainer = ByClosure(**parts, fails_in="train_step", fails_at=2, gradient_accumulation_steps=3)
    (place, *_) = notes_of(lambda: trainer.train(tiny_data(), num_epochs=1))
    assert "batch 2 of 3" in place


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_has_no_note(error: BaseException) -> None:
    assert train("train_step", error=error) == []


def test_an_exception_between_steps_has_no_note() -> None:
    assert train("on_epoch_end") == []


def test_an_exception_of_an_evaluation_in_a_run_has_the_step_before_it() -> None:
    place, *_ = train("eval_step", 2)
    assert place == "ptacc: raised in an evaluation after step 3, batch 2, on rank 0 of 1"


def test_an_exception_of_a_metric_says_that_the_batches_are_over() -> None:
    trainer = Faulty(**tiny_parts(), fails_in="compute_metrics")
    (place, *rest) = notes_of(lambda: trainer.evaluate({"test": tiny_data()}))
    assert place == "ptacc: raised in the evaluation of 'test', after its 3 batches, on rank 0 of 1"
    assert rest == []


def test_an_exception_of_a_prediction_has_the_batch() -> None:
    trainer = Faulty(**tiny_parts(), fails_in="predict_step", fails_at=3)
    (place, *batch) = notes_of(lambda: trainer.predict(tiny_data()))
    assert place == "ptacc: raised in a prediction, batch 3, on rank 0 of 1"
    assert batch == [*BATCH, "  indices of its samples: 16, 17, 18, 19, 20, 21, 22, 23"]


def test_an_evaluation_that_a_step_calls_has_one_note() -> None:
    class Evaluating(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            trainer.evaluate(tiny_data())

    trainer = Faulty(**tiny_parts(), fails_in="eval_step", callbacks=[Evaluating()])
    assert "in an evaluation after step 1" in notes_of(lambda: trainer.train(tiny_data(), num_epochs=1))[0]


class BadSample(Dataset[Pair]):
    def __len__(self) -> int:
        return 24

    @override
    def __getitem__(self, index: int) -> Pair:
        if index == 17:
            raise FaultError("on purpose")
        return torch.zeros(4, dtype=torch.float64), torch.tensor(0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.timeout(60))])
def test_an_exception_of_the_data_says_that_batches_were_loaded(workers: int) -> None:
    data, trainer = BadSample(), Trainer(**tiny_parts())
    kwargs: dict[str, Any] = {"train_dataloader_kwargs": {"num_workers": workers, "shuffle": False}}
    assert notes_of(lambda: trainer.train(data, num_epochs=1, **kwargs)) == [
        "ptacc: raised while the batches of step 3 of training (epoch 1) were loaded, on rank 0 of 1"
    ]
    assert notes_of(lambda: trainer.evaluate(data)) == [
        "ptacc: raised in an evaluation, while batch 3 was loaded, on rank 0 of 1"
    ]


def test_long_batches_are_shortened() -> None:
    samples = [{f"part {i}": torch.zeros(2) for i in range(12)}] * 20

    class Dicts(Trainer):
        @override
        def check_batch(self, batch: object) -> None: ...

    trainer = Dicts(**tiny_parts())
    data: Any = samples
    lines = notes_of(lambda: trainer.train(data, num_epochs=1, per_device_batch_size=20), ValueError)
    assert lines[1] == "  batch['part 0']: float32 (20, 2) on cpu"
    assert lines[9] == "  and 4 more values"
    assert lines[10].endswith("and 12 more")


def test_each_rank_notes_its_own_batch_and_the_others_report_its_failure() -> None:
    def worker() -> list[str]:
        trainer = Faulty(**tiny_parts())
        trainer.fails_in = "train_step" if trainer.distributed.rank == 1 else ""
        with pytest.raises(Exception, match="on purpose") as caught:
            trainer.train(tiny_data(), num_epochs=1, **IN_ORDER)
        return getattr(caught.value, "__notes__", [])

    first, (note,) = run_ranks(worker, 2)
    assert first == []
    assert note.splitlines()[0] == "ptacc: raised in step 1 of training (epoch 1), batch 1 of 1, on rank 1 of 2"
    assert note.splitlines()[1:3] == BATCH
    assert note.splitlines()[-1] == "  indices of its samples: 8, 9, 10, 11, 12, 13, 14, 15"


def test_a_note_keeps_no_tensor_alive() -> None:
    def raise_error() -> tuple[FaultError, "weakref.ref[Tensor]"]:
        model = nn.Linear(4, 1)
        trainer = Faulty(model, loss_func=mse_loss, optimizer=SGD(model.parameters(), lr=0.1), fails_in="train_step")
        data = TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
        with pytest.raises(FaultError) as caught:
            trainer.train(data, num_epochs=1)
        return caught.value.with_traceback(None), weakref.ref(data.tensors[0])

    error, tensor = raise_error()
    gc.collect()
    assert error.__notes__
    assert tensor() is None


def test_memory_that_runs_out_is_described() -> None:
    def allocate(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.empty(10**15)

    trainer = Trainer(**tiny_parts())
    trainer.loss_func = allocate
    lines = notes_of(lambda: trainer.train(tiny_data(), num_epochs=1), RuntimeError)
    assert "memory: weights 80 B" in lines
    assert "largest tensors:" in lines
