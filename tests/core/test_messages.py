"""What a run reports through the logger `ptacc`."""

import io
import logging
from collections.abc import Callable
from contextlib import redirect_stderr
from os import PathLike
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ptacc import Best, Callback, CheckpointMixin, SaveBest, SeedMixin, StepResult, Steps, Trainer
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import find_learning_rate
from tests.ranks import run_ranks


class Saving(CheckpointMixin, SeedMixin, Trainer):
    seed: int | None = 0
    resume: bool | str | PathLike[str] = True


class After(Callback[Saving]):
    """Acts after a step."""

    def __init__(self, step: int, act: Callable[[Saving], object]) -> None:
        self._step, self._act = step, act

    @override
    def on_step_end(self, trainer: Saving, step: StepResult) -> None:
        if step.step == self._step:
            self._act(trainer)


def run(directory: Path, *callbacks: Callback[Any], num_epochs: int = 2, **options: Any) -> None:
    trainer = Saving(**tiny_parts(), checkpoint_dir=directory, callbacks=callbacks, **options)
    trainer.train(tiny_data(), tiny_data(8), num_epochs=num_epochs)


def levels(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return the level of each message, and its last word without the directory."""
    return [(record.levelname, record.getMessage().rpartition("/")[2]) for record in caplog.records]


def test_the_last_checkpoint_is_reported_and_periodic_ones_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ptacc")
    run(tmp_path)
    assert levels(caplog) == [("DEBUG", "step-00000003"), ("INFO", "step-00000006")]
    assert caplog.messages[0] == f"saved {tmp_path}/step-00000003"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("what", ["best", "label", "request"])
def test_best_and_requested_checkpoints_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, in_background: bool
) -> None:
    caplog.set_level(logging.INFO, "ptacc")
    callbacks: dict[str, Callback[Any]] = {
        "best": After(0, print),
        "label": SaveBest("eval_loss"),
        "request": After(3, lambda trainer: trainer.save_checkpoint(tmp_path / "other" / "step-00000003")),
    }
    best = Best("eval_loss") if what == "best" else None
    options: Any = {"checkpoint_every": None, "checkpoint_in_background": in_background, "keep_best": best}
    run(tmp_path / "run", callbacks[what], **options)
    assert levels(caplog) == [("INFO", "step-00000003"), ("INFO", "step-00000006")]


def test_a_checkpoint_after_an_exception_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupting(Callback[Saving]):
        @override
        def on_save(self, trainer: Saving, path: str) -> None:
            raise KeyboardInterrupt

    caplog.set_level(logging.INFO, "ptacc")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupting(), checkpoint_every=Steps(2))
    assert levels(caplog) == [("INFO", "step-00000002.01")]


def test_a_stop_is_reported_with_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ptacc")
    run(tmp_path, After(2, lambda trainer: trainer.stop("enough")))
    assert caplog.messages == [f"saved {tmp_path}/step-00000002", "stopped after step 2: enough"]


def test_a_resumed_run_says_from_where(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, num_epochs=1)
    caplog.set_level(logging.INFO, "ptacc")
    run(tmp_path)
    assert caplog.messages[0] == f"resumed from step 3 ({tmp_path}/step-00000003)"
    assert len(caplog.messages) == 2


def test_a_run_that_resumes_within_an_epoch_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, After(2, lambda trainer: trainer.stop("enough")))
    caplog.set_level(logging.INFO, "ptacc")
    run(tmp_path, resume_ignore={"stop"})
    assert [message for message in caplog.messages if "resumed" in message] == [caplog.messages[0]]


def test_only_rank_0_reports(tmp_path: Path) -> None:
    def train() -> str:
        logging.root.handlers = []
        with redirect_stderr(io.StringIO()) as stderr:
            run(tmp_path)
        return stderr.getvalue()

    assert run_ranks(train, 2) == [f"saved {tmp_path}/step-00000004\n", ""]


def test_the_copies_of_a_search_report_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ptacc")
    find_learning_rate(Saving(**tiny_parts(), checkpoint_dir=tmp_path), tiny_data())
    assert caplog.messages == []
