"""A state that stays out of checkpoints is named at the start of the run."""

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, Mixin, ProfilerMixin, StateKey, StepResult, Trainer
from ptacc.testing import tiny_data, tiny_parts


@dataclass
class Mean:
    value: float = 0.0


@dataclass
class SavedMean(Mean):
    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.value = state_dict["value"]


UNSAVED: StateKey[Mean] = StateKey("mean")
SAVED: StateKey[Mean] = StateKey("saved mean")
NOT_NEEDED: StateKey[Mean] = StateKey("timer", saved=False)


class Saving(CheckpointMixin, Trainer): ...


def train(trainer: type[CheckpointMixin], directory: Path, **options: Any) -> Any:
    saving: Any = trainer(**tiny_parts(), checkpoint_dir=directory, resume=True, **options)
    saving.train(tiny_data(), num_epochs=1)
    return saving


def test_a_run_state_without_state_dict_is_named(tmp_path: Path) -> None:
    class Averages(Mixin):
        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.run[UNSAVED], self.run[SAVED], self.run[NOT_NEEDED] = Mean(), SavedMean(), SavedMean()

    class Averaging(Averages, Saving): ...

    with pytest.warns(
        UserWarning, match=r"will not contain the state 'mean', a Mean, so .*StateKey\(\.\.\., saved=False\)"
    ):
        train(Averaging, tmp_path)


def test_an_attribute_that_is_not_an_option_is_named(tmp_path: Path) -> None:
    class Counting(Saving):
        seen: int = field(init=False, default=0)
        notes: list[int] = field(init=False, default_factory=list, metadata={"saved": False})

        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.total = 0.0

        @functools.cached_property
        def scale(self) -> float:
            return 2.0

    assert Counting(**tiny_parts(), checkpoint_dir=tmp_path).scale == 2.0
    with pytest.warns(UserWarning, match="will not contain the attribute 'seen', the attribute 'total', so"):
        train(Counting, tmp_path)


def test_a_callback_with_half_a_state_is_named(tmp_path: Path) -> None:
    class Half(Callback[object]):
        def state_dict(self) -> dict[str, int]:
            return {"steps": 1}

    with pytest.warns(UserWarning, match=r"the state of Half, which has only state_dict\(\)"):
        train(Saving, tmp_path, callbacks=[Half()])


def test_a_state_that_need_not_be_saved_stays_out_of_checkpoints(tmp_path: Path) -> None:
    class Timing(Saving):
        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.run[NOT_NEEDED], self.run[SAVED] = SavedMean(), SavedMean()

        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            self.run[NOT_NEEDED].value = self.run[SAVED].value = 3.0

    train(Timing, tmp_path)
    resumed = train(Timing, tmp_path)
    assert (resumed.run[NOT_NEEDED].value, resumed.run[SAVED].value) == (0.0, 3.0)


def test_the_states_of_ptacc_are_not_named(tmp_path: Path) -> None:
    class Profiling(ProfilerMixin, Saving): ...

    with warnings.catch_warnings(action="error"):
        train(Profiling, tmp_path)
