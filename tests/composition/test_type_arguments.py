"""Which batch types a mixin may have in a loop with other batch types, and which models a loop accepts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, Protocol, TypedDict, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD
from typing_extensions import TypeAliasType, TypeVar, override

from ptacc import BatchMixin, MetricsMixin, Pair, StepOutput, Trainer, TrainingLoop
from ptacc.composition.type_arguments import may_accept
from ptacc.errors import CompositionError, ModelError, OptionError
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


# ---- the class of the model


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class WideNet(Net): ...


class GenericNet(Net, Generic[T]): ...


NetT = TypeVar("NetT", bound=Net)
WideT = TypeVar("WideT", bound=Net, default=WideNet)


class NetTrainer(Trainer[Net]): ...


class BoundTrainer(Trainer[NetT], Generic[NetT]): ...


class WithDefault(Trainer[WideT], Generic[WideT]): ...


class DefaultTrainer(WithDefault): ...


class GenericNetTrainer(BoundTrainer[GenericNet[int]]): ...


class EitherTrainer(Trainer[Net | nn.Conv2d]): ...


class AnyTrainer(Trainer[Any]): ...


def make(trainer: Callable[..., Trainer], model: nn.Module) -> Trainer:
    return trainer(model, loss_func=nn.MSELoss(), optimizer=SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("trainer", "model"),
    [
        (NetTrainer, Net()),
        (NetTrainer, WideNet()),
        (NetTrainer, spectral_norm(Net())),
        (BoundTrainer, WideNet()),
        (WithDefault, Net()),
        (DefaultTrainer, WideNet()),
        (GenericNetTrainer, GenericNet[int]()),
        (EitherTrainer, nn.Conv2d(1, 1, 1)),
        (AnyTrainer, nn.Linear(2, 2)),
        (Trainer[Net], Net()),
        (Trainer, nn.Linear(2, 2)),
    ],
)
def test_a_model_of_the_stated_class_is_accepted(trainer: type[Trainer], model: nn.Module) -> None:
    assert make(trainer, model).unwrapped_model is model


@pytest.mark.parametrize(
    ("trainer", "model", "stated"),
    [
        (NetTrainer, nn.Linear(2, 2), "Net"),
        (BoundTrainer, nn.Linear(2, 2), "Net"),
        (DefaultTrainer, Net(), "WideNet"),
        (GenericNetTrainer, Net(), "GenericNet"),
        (EitherTrainer, nn.Linear(2, 2), "Conv2d"),
    ],
)
def test_a_model_of_another_class_is_refused(trainer: type[Trainer], model: nn.Module, stated: str) -> None:
    with pytest.raises(OptionError, match=rf"{trainer.__name__}\(model=.*must be an instance of .*{stated}"):
        make(trainer, model)


def test_a_compiled_model_of_the_stated_class_is_refused_as_wrapped() -> None:
    with pytest.raises(ModelError, match="Pass the original model"):
        make(NetTrainer, cast(nn.Module, torch.compile(Net(), backend="eager")))


def test_a_type_of_samples_in_the_place_of_the_models_class_is_refused() -> None:
    fix = r"TrainingLoop\[tuple\[Tensor, Tensor\], Tensor, nn.Module, tuple\[Tensor, int\]\]"
    with pytest.raises(CompositionError, match=fix):

        class Mine(TrainingLoop[Pair, Tensor, tuple[Tensor, int]]): ...  # type: ignore[type-var]


def test_a_protocol_as_the_models_class_is_refused() -> None:
    with pytest.raises(CompositionError, match="for the model is HasIds, and must be a subclass"):

        class Mine(Trainer[HasIds]): ...  # type: ignore[type-var]
