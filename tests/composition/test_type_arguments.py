"""Which batches a mixin may take beside those of the loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Protocol, TypedDict

import pytest
from torch import Tensor, nn
from typing_extensions import TypeAliasType, TypeVar, override

from ptacc import BatchMixin, MetricsMixin, Pair, StepOutput, Trainer, TrainingLoop
from ptacc.composition.type_arguments import may_accept
from ptacc.errors import CompositionError
from ptacc.types.aliases import BatchT, OutputT

T = TypeVar("T")


class Named(NamedTuple):
    inputs: Tensor
    targets: Tensor


class Ids(TypedDict):
    ids: Tensor


class Masked(Ids):
    mask: Tensor


class HasIds(Protocol):
    ids: Tensor


class Tokens:
    ids: Tensor


class MoreTokens(Tokens): ...


class Box(Generic[T]): ...


PairAlias = TypeAliasType("PairAlias", tuple[Tensor, Tensor])
UserId = NewType("UserId", int)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (object, Tokens),
        (Any, Tokens),
        (Tokens, Any),
        (Tokens, MoreTokens),
        (Tensor, nn.Parameter),
        (Pair, Named),
        (Pair, PairAlias),
        (PairAlias, Pair),
        (tuple[Annotated[Tensor, "inputs"], Tensor], Pair),
        (Annotated[Tokens, 1], MoreTokens),
        (tuple[Tensor, ...], Pair),
        (Pair, tuple[Tensor, ...]),
        (tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]),
        (tuple, Pair),
        (Tensor | Tokens, MoreTokens),
        (Tensor | None, None),
        (Tensor | Tokens | None, Tensor | None),
        (Sequence[Tensor], list[Tensor]),
        (Mapping[str, Tensor], dict[str, Tensor]),
        (dict[str, Any], dict[str, Tensor]),
        (Ids, Masked),
        (HasIds, Tokens),
        (float, int),
        (UserId, int),
        (BatchMixin.__parameters__[0], Tokens),  # type: ignore[attr-defined]  # Generic sets it
        (Literal["a"], Literal["b"]),
        (Callable[[int], str], Callable[[int], str]),
    ],
)
def test_a_wider_or_undecidable_type_is_taken(wide: Any, narrow: Any) -> None:
    assert may_accept(wide, narrow)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (Tensor, Tokens),
        (MoreTokens, Tokens),
        (Pair, Tensor),
        (Pair, tuple[Tensor, Tensor, Tensor]),
        (Pair, tuple[Tensor, Tokens]),
        (Pair, dict[str, Tensor]),
        (tuple[Tensor, ...], tuple[Tensor, Tokens]),
        (Tokens, Tensor | Tokens),
        (Tensor | dict[str, Tensor], Tokens),
        (dict[str, Tensor], dict[str, Tokens]),
        (Ids, Tokens),
        (int, float),
        (Box[int], Box[str]),
        (PairAlias, Tensor),
    ],
)
def test_another_type_is_refused(wide: Any, narrow: Any) -> None:
    assert not may_accept(wide, narrow)


class OfTokens(TrainingLoop[Tokens, Tensor]):
    @override
    def train_step(self, batch: Tokens) -> StepOutput[Tensor]:
        raise NotImplementedError


class Looks(BatchMixin[BatchT, OutputT]): ...


class LooksAtTokens(BatchMixin[Tokens, Tensor]): ...


class LooksAtAll(BatchMixin[object, object]): ...


def test_a_bare_mixin_is_for_pairs() -> None:
    with pytest.raises(CompositionError, match=r"batches are Tokens, and MetricsMixin takes tuple\[Tensor, Tensor\]"):

        class Mine(MetricsMixin, OfTokens): ...  # type: ignore[misc]


def test_the_message_tells_the_form_that_is_taken() -> None:
    with pytest.raises(CompositionError, match=r"Write the loop's types after it, `Looks\[Tokens, Tensor\]`"):

        class Wrong(Looks, OfTokens): ...  # type: ignore[misc]

    class Right(Looks[Tokens, Tensor], OfTokens): ...

    assert Looks in Right.__mro__


def test_outputs_that_disagree_are_refused() -> None:
    with pytest.raises(CompositionError, match="the loop's outputs are Tensor, and Looks takes int"):

        class Mine(Looks[Tokens, int], OfTokens): ...  # type: ignore[misc]


def test_a_mixin_that_is_not_generic_is_told_otherwise() -> None:
    with pytest.raises(CompositionError, match=r"make it generic, `class LooksAtTokens\(BatchMixin\[BatchT, OutputT\]"):

        class Mine(LooksAtTokens, Trainer): ...  # type: ignore[misc]


def test_two_mixins_of_different_batches_fit_no_loop() -> None:
    with pytest.raises(CompositionError, match=r"batches are Tokens, and MetricsMixin takes tuple\[Tensor, Tensor\]"):

        class Mine(LooksAtTokens, MetricsMixin[Pair, Tensor], OfTokens): ...  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleMethodOverride]


def test_a_mixin_of_wider_batches_is_taken() -> None:
    class Mine(LooksAtAll, OfTokens): ...  # pyright: ignore[reportGeneralTypeIssues]  # mypy has it right

    assert LooksAtAll in Mine.__mro__


def test_types_are_followed_through_generic_classes() -> None:
    class Counts(Looks[BatchT, Tensor], Generic[BatchT]): ...

    class Loop(Counts[BatchT], TrainingLoop[BatchT, Tensor]):
        @override
        def train_step(self, batch: BatchT) -> StepOutput[Tensor]:
            raise NotImplementedError

    class Right(LooksAtTokens, Loop[Tokens]): ...

    with pytest.raises(CompositionError, match="the loop's batches are int, and LooksAtTokens takes Tokens"):

        class Wrong(LooksAtTokens, Loop[int]): ...  # type: ignore[misc]


def test_a_generic_loop_decides_nothing_until_its_types_are_known() -> None:
    class Loop(Looks[T, Tensor], TrainingLoop[T, Tensor]):
        @override
        def train_step(self, batch: T) -> StepOutput[Tensor]:
            raise NotImplementedError

    assert Loop[Tokens] is not None
