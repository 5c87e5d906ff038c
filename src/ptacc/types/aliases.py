"""Values: what steps put out, what a run reports, how its length and its cadences are told.

Terms: a *batch* is one item of a loader, a *step* is one optimizer update, an *epoch* is one pass over the data. An
*item* is what the loss is a mean over: a sample, or a token. Counts are of completed things.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, TypeAlias

from torch import Tensor
from typing_extensions import TypeVar

BatchT = TypeVar("BatchT", default=tuple[Tensor, Tensor])
OutputT = TypeVar("OutputT", default=Tensor)
OutputT_co = TypeVar("OutputT_co", covariant=True, default=Tensor)
SampleT = TypeVar("SampleT", default=BatchT)
"""Samples that the default collate function turns into a batch: of the batch's own type, if not said otherwise."""
RawT = TypeVar("RawT", default=object)
"""Samples that a collate function of the user's own takes."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A supervised batch: inputs `(items, ...)` and targets `(items, ...)`."""

PairSample: TypeAlias = tuple[Tensor, int] | tuple[Tensor, float] | tuple[Tensor, ...]
"""Samples that torch's own collate function turns into a `Pair`."""

Precision: TypeAlias = Literal["no", "fp16", "bf16"]
ZeroStage: TypeAlias = Literal[0, 1, 2, 3]
CompileBackend: TypeAlias = Literal["no", "eager", "aot_eager", "inductor", "cudagraphs", "onnxrt", "tensorrt", "tvm"]
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune"]
Mode: TypeAlias = Literal["min", "max"]
Duration: TypeAlias = float | timedelta
"""A length of time: seconds, or a `timedelta`."""
