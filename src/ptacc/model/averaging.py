"""Running averages of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ptacc.model.state_dict import canonical_name
from ptacc.tensors.dtensor import full_tensor, is_dtensor, match_placement, to_local

AVERAGE_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    **{dtype: dtype for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)},
}
"""The dtypes that are averaged, with the dtype of the average."""


class AveragedWeights:
    """A running average of a model's floating and complex parameters and buffers.

    Other tensors have no average: with the averages, the model has its present ones. The averages have the placement of
    their tensors, and their dtype or float32: in 16 bits, small changes of an average would be rounded away.

    Attributes:
        updates: How often the averages were updated.
        is_applied: Whether the model has the averages, within `applied`.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start with a copy of the model's present tensors."""
        self.updates: int = 0
        self.is_applied: bool = False
        self._averages: dict[str, Tensor] = {}
        self._may_be_infinite: set[str] = set()
        self._versions: list[tuple[int, int]] = []
        self.copy_from(model)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The averages by canonical name."""
        return self._averages

    @torch.no_grad()
    def update(self, model: nn.Module, weight: float) -> None:
        """Move each average towards the model's present tensor by `weight`, in [0, 1].

        A tensor that is new, or has another shape or dtype than before, starts with a copy. Infinite and NaN entries of
        buffers are copied.
        """
        before, self._averages = self._averages, {}
        finite: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for name, tensor in averageable_tensors(model):
            average = before.get(name)
            if average is None or average.shape != tensor.shape or average.dtype != AVERAGE_DTYPES[tensor.dtype]:
                self._start(name, tensor)
                continue
            self._averages[name] = average
            pairs = others if name in self._may_be_infinite else finite
            pairs.append((average, tensor if tensor.dtype == average.dtype else tensor.to(average.dtype)))
        for averages, tensors in foreach_groups(finite):
            # torch has no public name for it.
            torch._foreach_lerp_(averages, tensors, weight)  # pyright: ignore[reportPrivateImportUsage]
        for averages, tensors in foreach_groups(others):
            lerp_finite(averages, tensors, weight)
        self.updates += 1

    def copy_to(self, model: nn.Module) -> None:
        """Set the model's tensors to their averages."""
        copy_into(self._pairs(model))

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Set the averages to the model's present tensors."""
        self._averages, self._may_be_infinite = {}, set()
        for name, tensor in averageable_tensors(model):
            self._start(name, tensor)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Generator[None]:
        """Give the model the averages for the block. Blocks within it change nothing."""
        if self.is_applied:
            yield
            return
        own = [(tensor, tensor.detach().clone()) for tensor, _ in self._pairs(model)]
        self.is_applied, were_current = True, self.are_current(model)
        try:
            self.copy_to(model)
            yield
        finally:
            self.is_applied = False
            copy_into(own)
            if were_current:
                self.mark_current(model)

    def mark_current(self, model: nn.Module) -> None:
        """Record that these are the averages of the model's present parameters."""
        self._versions = parameter_versions(model)

    def are_current(self, model: nn.Module) -> bool:
        """Return whether no parameter was replaced or written to since `mark_current`, or the averages are applied."""
        return self.is_applied or self._versions == parameter_versions(model)

    @torch.no_grad()
    def sync_buffers(self, model: nn.Module, broadcast: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Set the averages of buffers to those of rank 0, as engines do for the buffers themselves. A collective."""
        found = [(name, self._averages.get(canonical_name(name))) for name, _ in model.named_buffers()]
        averages = {name: average for name, average in found if average is not None and not is_dtensor(average)}
        for name, value in broadcast({name: average.cpu() for name, average in averages.items()}).items():
            averages[name].copy_(value)

    @torch.no_grad()
    def unshard(self) -> None:
        """Gather sharded averages. A collective if any average is sharded."""
        self._averages = {name: full_tensor(average) for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averages."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of averages of the same model. Tensors without a saved average start with the next update."""
        self.updates = state_dict["updates"]
        before, self._averages = self._averages, {}
        for name, saved in state_dict["averages"].items():
            average = before.get(name)
            if average is None or average.shape != saved.shape:  # the tensor was added to the model in the saved run
                device = next(iter(before.values())).device if before else saved.device
                average = full_tensor(saved).to(device, copy=True)
                self._may_be_infinite.add(name)
            else:
                average.copy_(match_placement(average, saved))
            self._averages[name] = average

    def _start(self, name: str, tensor: Tensor) -> None:
        average = tensor.detach().to(AVERAGE_DTYPES[tensor.dtype], copy=True)
        if not isinstance(tensor, nn.Parameter) or not to_local(average).isfinite().all():
            self._may_be_infinite.add(name)
            average = average.contiguous()
        self._averages[name] = average

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the model's tensors that have an average, each with it."""
        averages = self._averages
        return [(tensor, averages[name]) for name, tensor in averageable_tensors(model) if name in averages]


def holds_averages(state: object) -> bool:
    """Return whether a state is that of `AveragedWeights`."""
    return isinstance(state, Mapping) and {"updates", "averages"} <= state.keys()


def averageable_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that can be averaged, each once, by canonical name.

    Lazy parameters are left out until they have a shape, and so are expanded tensors, which cannot be written to.
    """
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if tensor.dtype in AVERAGE_DTYPES and not is_lazy(tensor) and 0 not in tensor.stride():
                yield canonical_name(name), tensor


def parameter_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return numbers that change if a parameter is replaced or written to in place."""
    parameters: Iterable[Any] = model.parameters()
    return [(id(p), 0 if is_lazy(p) or p.is_inference() else p._version) for p in parameters]  # noqa: SLF001  # see torch's notes


@torch.no_grad()
def copy_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, unless their shapes differ."""
    for tensor, value in pairs:
        if tensor.shape == value.shape:
            tensor.copy_(value)


def lerp_finite(averages: list[Tensor], tensors: list[Tensor], weight: float) -> None:
    """Move averages towards tensors by `weight`, by a few kernels. Entries that become infinite or NaN are copied."""
    flat = [to_local(average).view(-1) for average in averages]
    present = torch.cat([to_local(tensor).flatten() for tensor in tensors])
    moved = torch.cat(flat).lerp_(present, weight)
    parts = torch.split(torch.where(moved.isfinite(), moved, present), [average.numel() for average in flat])
    torch._foreach_copy_(flat, list(parts))  # pyright: ignore[reportPrivateImportUsage]


def foreach_groups(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Group pairs of tensors by dtype, device and device mesh, as foreach kernels need them."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for left, right in pairs:
        lefts, rights = groups.setdefault((left.dtype, left.device, getattr(left, "device_mesh", None)), ([], []))
        lefts.append(left)
        rights.append(right)
    yield from groups.values()
