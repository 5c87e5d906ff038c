"""Which batch types a mixin may have in a loop with other batch types."""

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
        (BatchMixin.__parameters__[0], Tokens),  # type: ignore[attr-defined]  # set by Generic
        (Literal["a"], Literal["b"]),
        (Callable[[int], str], Callable[[int], str]),
    ],
)
def test_a_wider_or_undecidable_type_is_accepted(wide: Any, narrow: Any) -> None:
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


class TokenLoop(TrainingLoop[Tokens, Tensor]):
    @override
    def train_step(self, batch: Tokens) -> StepOutput[Tensor]:
        raise NotImplementedError


class GenericMixin(BatchMixin[BatchT, OutputT]): ...


class TokenMixin(BatchMixin[Tokens, Tensor]): ...


class AnyMixin(BatchMixin[object, object]): ...


def test_a_mixin_without_type_arguments_is_for_pairs() -> None:
    with pytest.raises(CompositionError, match=r"batches are Tokens, and MetricsMixin accepts tuple\[Tensor, Tensor\]"):

        class Mine(MetricsMixin, TokenLoop): ...  # type: ignore[misc]


def test_the_message_shows_the_type_arguments_to_write() -> None:
    with pytest.raises(CompositionError, match=r"Give it the loop's types, `GenericMixin\[Tokens, Tensor\]`"):

        class Wrong(GenericMixin, TokenLoop): ...  # type: ignore[misc]

    class Right(GenericMixin[Tokens, Tensor], TokenLoop): ...

    assert GenericMixin in Right.__mro__


def test_outputs_that_disagree_are_refused() -> None:
    with pytest.raises(CompositionError, match="the loop's outputs are Tensor, and GenericMixin accepts int"):

        class Mine(GenericMixin[Tokens, int], TokenLoop): ...  # type: ignore[misc]


def test_the_message_for_a_mixin_that_is_not_generic_suggests_to_make_it_generic() -> None:
    with pytest.raises(CompositionError, match=r"make it generic, `class TokenMixin\(BatchMixin\[BatchT, OutputT\]"):

        class Mine(TokenMixin, Trainer): ...  # type: ignore[misc]


def test_mixins_for_different_batches_are_refused() -> None:
    with pytest.raises(CompositionError, match=r"batches are Tokens, and MetricsMixin accepts tuple\[Tensor, Tensor\]"):

        class Mine(TokenMixin, MetricsMixin[Pair, Tensor], TokenLoop): ...  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleMethodOverride]


def test_a_mixin_for_wider_batches_is_accepted() -> None:
    class Mine(AnyMixin, TokenLoop): ...  # pyright: ignore[reportGeneralTypeIssues]  # mypy accepts it

    assert AnyMixin in Mine.__mro__


def test_type_arguments_are_substituted_through_generic_classes() -> None:
    class Counts(GenericMixin[BatchT, Tensor], Generic[BatchT]): ...

    class Loop(Counts[BatchT], TrainingLoop[BatchT, Tensor]):
        @override
        def train_step(self, batch: BatchT) -> StepOutput[Tensor]:
            raise NotImplementedError

    class Right(TokenMixin, Loop[Tokens]): ...

    with pytest.raises(CompositionError, match="the loop's batches are int, and TokenMixin accepts Tokens"):

        class Wrong(TokenMixin, Loop[int]): ...  # type: ignore[misc]


def test_a_generic_loop_is_not_checked_until_its_types_are_known() -> None:
    class Loop(GenericMixin[T, Tensor], TrainingLoop[T, Tensor]):
        @override
        def train_step(self, batch: T) -> StepOutput[Tensor]:
            raise NotImplementedError

    assert Loop[Tokens] is not None
