from pathlib import Path
from typing import Any

import pytest

from ptacc import CheckpointMixin, Steps, TrackingMixin, Trainer
from ptacc.run.history import VALUES_IN_MEMORY, RunHistory
from ptacc.testing import tiny_data, tiny_parts
from ptacc.types.outputs import ValuesRecord
from tests.tracking.recorder import Recorder


class Saved(TrackingMixin, CheckpointMixin, Trainer): ...


class Remembering(Recorder):
    """A tracker that has the values up to a step when it continues a run."""

    def __init__(self, last_step: int) -> None:
        super().__init__()
        self.last_step = last_step


@pytest.mark.parametrize(
    ("last_step", "logged"),
    [(-1, [2, 3, 4, 6, 8]), (2, [3, 4, 6, 8]), (4, [6, 8]), (6, [8]), (7, [8])],
)
def test_what_a_killed_process_lost_is_logged_again_and_nothing_twice(
    last_step: int, logged: list[int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "log_every": Steps(2)}
    Saved(**tiny_parts(), trackers=[Recorder()], **options).train(tiny_data(), max_steps=4)
    again = Remembering(last_step)
    Saved(**tiny_parts(), trackers=[again], resume=True, **options).train(tiny_data(), max_steps=8)
    assert again.steps == logged


def test_the_reports_of_the_last_seconds_stay_in_memory() -> None:
    history = RunHistory()
    for step in range(VALUES_IN_MEMORY + 1):
        history.add_values(ValuesRecord(step, 1, {"epoch": 1.0}))
    recent = [record.step for record in history.values][-100:]
    assert recent == list(range(VALUES_IN_MEMORY - 99, VALUES_IN_MEMORY + 1))


def test_a_tracker_that_failed_is_started_again_when_the_run_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "log_every": Steps(2)}
    with pytest.warns(UserWarning, match="failed"):
        Saved(**tiny_parts(), trackers=[Recorder(fails_in="start")], **options).train(tiny_data(), max_steps=4)
    again = Recorder()
    Saved(**tiny_parts(), trackers=[again], resume=True, **options).train(tiny_data(), max_steps=8)
    assert (again.starts, again.steps) == ([None], [6, 8])
