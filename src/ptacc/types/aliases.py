"""Type variables and aliases that several packages share."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, Protocol, TypeAlias

from torch import Tensor, nn
from typing_extensions import TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
BatchT = TypeVar("BatchT", default=tuple[Tensor, Tensor])
OutputT = TypeVar("OutputT", default=Tensor)
OutputT_co = TypeVar("OutputT_co", covariant=True, default=Tensor)
ModelT = TypeVar("ModelT", bound=nn.Module, default=nn.Module, covariant=True)  # noqa: PLC0105  # as for SampleT
"""The user's model. A trainer of a class of models is also one of their base class, such as `nn.Module`."""
SampleT = TypeVar("SampleT", default=BatchT, contravariant=True)  # noqa: PLC0105  # the name that users see in errors
"""Samples that the default collate function turns into a batch. By default of the same type as the batch.

A trainer only takes samples: one for `Sequence[Tensor]` is also one for `tuple[Tensor, ...]`.
"""
RawT = TypeVar("RawT", default=object)
"""Samples that the user's collate function takes. The default only lets it follow type variables with defaults."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A supervised batch: inputs `(items, ...)` and targets `(items, ...)`."""


class NumpyLike(Protocol):
    """A NumPy array or scalar. Errors of type checkers name this protocol, which is shorter than NumPy's own types."""

    @property
    def __array_struct__(self) -> object: ...


ArrayLike: TypeAlias = Tensor | NumpyLike
PairSample: TypeAlias = tuple[ArrayLike, int] | tuple[ArrayLike, float] | tuple[ArrayLike, ...]
"""Samples that torch's default collate function turns into a `Pair`."""

Precision: TypeAlias = Literal["no", "fp16", "bf16"]
ZeroStage: TypeAlias = Literal[0, 1, 2, 3]
CompileBackend: TypeAlias = Literal["no", "eager", "aot_eager", "inductor", "cudagraphs", "onnxrt", "tensorrt", "tvm"]
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Mode: TypeAlias = Literal["min", "max"]
Duration: TypeAlias = float | timedelta
"""A length of time: seconds, or a `timedelta`."""
