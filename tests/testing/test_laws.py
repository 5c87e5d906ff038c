"""The laws of composition hold for every public mixin."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

import ptacc
from ptacc import CheckpointMixin, DDPMixin, DeepSpeedMixin, Mixin, StateKey, StepResult, testing
from ptacc.testing.laws import same

MIXINS = [
    value
    for value in vars(ptacc).values()
    if isinstance(value, type) and issubclass(value, Mixin) and value.__name__ not in {"Mixin", "BatchMixin"}
]
ENGINES = {mixin for mixin in MIXINS if mixin.make_engine is not Mixin.make_engine}
PAIRS = [
    pair
    for pair in itertools.combinations(MIXINS, 2)
    if not (ENGINES.issuperset(pair) and {DDPMixin, DeepSpeedMixin}.intersection(pair))  # a trainer has one engine
]
EXEMPT: dict[str, str] = {}
"""Mixins for which a law cannot hold, each with the reason."""


@pytest.mark.parametrize("mixin", [m for m in MIXINS if m.__name__ not in EXEMPT])
def test_the_laws_hold_for_a_mixin(mixin: type[Mixin]) -> None:
    testing.check_mixin(mixin)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_order_of_two_mixins_changes_nothing(first: type[Mixin], second: type[Mixin]) -> None:
    testing.check_order_changes_nothing(first, second)


def test_no_public_mixin_is_left_out() -> None:
    assert len(MIXINS) >= 6
    assert set(EXEMPT) <= {mixin.__name__ for mixin in MIXINS}


# ---- each law fails for a mixin that breaks it


class Dropping(Mixin):
    @ptacc.replaces_super
    @override
    def on_step_end(self, step: StepResult) -> None: ...


class Doubling(Mixin):
    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.optimizer.param_groups[0]["lr"] *= 2


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


COUNTER: StateKey[Counter] = StateKey("counter")


class Forgetful(Mixin):
    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.run[COUNTER] = Counter()

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.run[COUNTER].count += 1


class Halving(Mixin):
    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        for parameter in self.unwrapped_model.parameters():
            parameter.grad = halved(parameter.grad)


class Shifting(Mixin):
    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        for parameter in self.unwrapped_model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad + 1


class Suffixed(CheckpointMixin):
    """A user's mixin that derives from one of ptacc's, and adds an option that has no default."""

    suffix: str


def halved(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient / 2


def test_the_first_law_fails_for_a_hook_that_does_not_call_super() -> None:
    with pytest.raises(AssertionError, match=r"Dropping\.on_step_end does not reach"):
        testing.check_mixin(Dropping)


def test_the_second_law_fails_for_a_mixin_that_changes_losses_by_default() -> None:
    with pytest.raises(AssertionError, match="Doubling with default options changes losses"):
        testing.check_mixin(Doubling)


def test_the_third_law_fails_for_a_state_that_is_not_loaded() -> None:
    with pytest.raises(AssertionError, match="counter is not the same after loading"):
        testing.check_mixin(Forgetful)


def test_the_fourth_law_fails_for_mixins_whose_order_matters() -> None:
    with pytest.raises(AssertionError, match="depend on whether Halving or Shifting comes first"):
        testing.check_order_changes_nothing(Halving, Shifting)


def test_options_of_a_derived_mixin_are_added_to_those_of_its_base() -> None:
    testing.check_mixin(Suffixed, options={"suffix": "a"})
    testing.check_order_changes_nothing(Suffixed, Halving, {"suffix": "a"})


@pytest.mark.parametrize("pair", [(torch.tensor(float("nan")), torch.tensor(float("nan"))), (1.0, True)])
def test_same_is_strict_about_tensors_and_lenient_about_numbers(pair: tuple[Any, Any]) -> None:
    assert same(*pair) is (not isinstance(pair[0], Tensor))
