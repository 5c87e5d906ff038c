import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import field
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from typing_extensions import override

from ptacc import (
    Cadence,
    Callback,
    CheckpointMixin,
    GradAccumMixin,
    PrintMetrics,
    ProgressBar,
    StepResult,
    Steps,
    Trainer,
)
from ptacc.callbacks import progress_bar
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks
from tests.terminals import open_terminal

ALWAYS = 1e-9
"""Seconds between two updates of a bar that moves at every step."""


def make_parts(*callbacks: Callback[Any]) -> dict[str, Any]:
    return {**tiny_parts(), "callbacks": callbacks}


def show(act: Callable[[Trainer], object], seconds: float = ALWAYS, kind: type[Trainer] = Trainer) -> str:
    """Return what a bar writes."""
    out = io.StringIO()
    act(kind(**make_parts(ProgressBar(file=out, shown=True, refresh_seconds=seconds))))
    return out.getvalue()


def counters(text: str, title: str) -> list[str]:
    """Return the counters that follow a title, each once."""
    return list(dict.fromkeys(re.findall(rf"{title} (?:\|.*?\| )?([\d,]*\d(?:/[\d,]*\d)?)", text)))


def test_the_bar_is_hidden_without_a_terminal() -> None:
    out = io.StringIO()
    Trainer(**make_parts(ProgressBar(file=out))).train(tiny_data(), num_epochs=1)
    assert out.getvalue() == ""


class Writer:
    """A stream without `isatty`, as some services install."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


@pytest.mark.parametrize("stream", [None, Writer()], ids=["no console", "no isatty"])
@pytest.mark.parametrize("shown", [None, True])
def test_the_default_callbacks_work_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, stream: Writer | None, shown: bool | None
) -> None:
    trainer = Trainer(**make_parts(ProgressBar(shown=shown), PrintMetrics()))
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=1)
    trainer.print("a line")
    monkeypatch.undo()
    assert len(history) == 1


def test_the_bar_shows_loss_remaining_times_speed_and_learning_rate() -> None:
    with open_terminal(120) as terminal:
        bar = ProgressBar(file=terminal.file, refresh_seconds=ALWAYS)
        Trainer(**make_parts(bar)).train(tiny_data(), num_epochs=2)
    line = r"epoch 1/2 \|\S+ *\| 2/3, loss 0\.\d{4}, 00:00 left, run 00:00 left, [\d.]+k? items/s, lr 0\.1"
    assert re.search(line, terminal.text)
    assert terminal.screen == [""]


def test_what_does_not_fit_is_left_out() -> None:
    with open_terminal(40) as terminal:
        bar = ProgressBar(file=terminal.file, refresh_seconds=ALWAYS)
        Trainer(**make_parts(bar)).train(tiny_data(), num_epochs=2)
    frames = [frame.rstrip() for frame in terminal.text.split("\r")]
    assert max(map(len, frames)) < 40
    assert any(re.fullmatch(r"epoch 1/2 2/3, loss 0\.\d{4}, 00:00 left", frame) for frame in frames)


def test_the_bar_moves_at_every_step_of_a_short_epoch() -> None:
    text = show(lambda trainer: trainer.train(tiny_data(), num_epochs=2))
    assert counters(text, "epoch 1/2") == ["0/3", "1/3", "2/3", "3/3"]
    assert counters(text, "epoch 2/2") == ["0/3", "1/3", "2/3", "3/3"]


def test_the_bar_moves_at_most_once_in_its_interval() -> None:
    text = show(lambda trainer: trainer.train(tiny_data(), tiny_data(), num_epochs=2), seconds=3600)
    assert (counters(text, "epoch 1/2"), counters(text, "epoch 2/2"), counters(text, "evaluating")) == (["0/3"], [], [])


def test_the_loss_is_the_mean_over_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "LOSS_STEPS", 2)
    losses: list[float] = []

    def act(trainer: Trainer) -> None:
        losses.extend(step.loss for step in trainer.train(tiny_data(), num_epochs=1).steps)

    shown = re.findall(r"loss ([\d.]+)", show(act))
    first, second, third = losses
    assert list(dict.fromkeys(shown)) == [f"{mean:.4f}" for mean in (first, (first + second) / 2, (second + third) / 2)]


def test_evaluations_have_bars_of_their_own() -> None:
    text = show(lambda trainer: trainer.train(tiny_data(), {"held-out": tiny_data(16)}, num_epochs=1))
    assert counters(text, "evaluating held-out") == ["1/2", "2/2"]


def test_evaluations_and_predictions_outside_of_a_run_have_bars() -> None:
    def act(trainer: Trainer) -> None:
        trainer.evaluate(tiny_data())
        trainer.predict(tiny_data(16))

    text = show(act)
    assert (counters(text, "evaluating"), counters(text, "predicting")) == (["1/3", "2/3", "3/3"], ["1/2", "2/2"])


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.ones(4, dtype=torch.float64), torch.tensor(1)


def test_the_bar_of_a_stream_counts_to_the_last_step_or_shows_the_time_limit() -> None:
    assert counters(show(lambda trainer: trainer.train(Endless(), max_steps=2)), "epoch 1") == ["0/2", "1/2", "2/2"]
    text = show(lambda trainer: trainer.train(Endless(), max_time=1e-6))
    assert (counters(text, "epoch 1"), "run 00:00 left" in text) == (["0", "1"], True)


def test_the_bar_counts_the_steps_of_epochs_that_differ() -> None:
    class Accumulating(GradAccumMixin, Trainer):
        accumulation_schedule: Any = field(default_factory=lambda: {Steps(4): 2})

    text = show(lambda trainer: trainer.train(tiny_data(), num_epochs=3), kind=Accumulating)
    assert counters(text, "epoch 1/3") == ["0/3", "1/3", "2/3", "3/3"]
    assert counters(text, "epoch 2/3") == counters(text, "epoch 3/3") == ["0/2", "1/2", "2/2"]


def test_the_bar_shows_the_time_until_the_last_item() -> None:
    assert "run 00:00 left" in show(lambda trainer: trainer.train(Endless(), max_items=10))


def test_the_bar_of_a_partial_epoch_ends_at_its_last_step() -> None:
    text = show(lambda trainer: trainer.train(tiny_data(), max_steps=5))
    assert counters(text, "epoch 2/2") == ["0/2", "1/2", "2/2"]


def test_the_bar_of_a_resumed_epoch_starts_where_it_was_saved(tmp_path: Path) -> None:
    class Saving(CheckpointMixin, Trainer):
        checkpoint_dir: str | PathLike[str] = tmp_path
        checkpoint_every: Cadence | None = Steps(1)
        resume: bool | str | PathLike[str] = True

    Saving(**make_parts()).train(tiny_data(), max_steps=2)
    text = show(lambda trainer: trainer.train(tiny_data(), num_epochs=1), kind=Saving)
    assert counters(text, "epoch 1/1") == ["2/3", "3/3"]


def test_only_rank_0_has_a_bar() -> None:
    first, second = run_ranks(lambda: show(lambda trainer: trainer.train(tiny_data(32), num_epochs=1)), 2)
    assert (counters(first, "epoch 1/1"), second) == (["0/2", "1/2", "2/2"], "")


def test_the_bar_is_closed_by_an_exception() -> None:
    class Failing(Trainer):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            raise KeyError("on purpose")

    with open_terminal(80) as terminal, pytest.raises(KeyError):
        Failing(**make_parts(ProgressBar(file=terminal.file))).train(tiny_data(), num_epochs=1)
    assert ("epoch 1/1" in terminal.text, terminal.screen) == (True, [""])


def test_lines_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talking(Callback[Trainer]):
        @override
        def on_step_end(self, trainer: Trainer, step: StepResult) -> None:
            trainer.print("step", step.step)

    with open_terminal(80) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal.file)
        monkeypatch.setattr(sys, "stderr", terminal.file)
        bar = ProgressBar(refresh_seconds=ALWAYS)
        Trainer(**make_parts(bar, PrintMetrics(), Talking())).train(tiny_data(), tiny_data(), num_epochs=1)
        monkeypatch.undo()
    *steps, header, row, end = terminal.screen
    assert steps == ["step 1", "step 2", "step 3"]
    assert (header.split()[:2], row.split()[:2], end) == (["epoch", "step"], ["1", "3"], "")
