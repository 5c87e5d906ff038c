"""Averaging the gradients of a step over ranks that have replicas of the model."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from ptacc.engines.base import OptimizerSlot, all_parameters
from ptacc.engines.common import broadcast_tensors
from ptacc.engines.reduction import join_names
from ptacc.errors import ModelError

BUCKET_BYTES = 25 << 20
"""Bytes of gradients that are averaged together, as in torch's DistributedDataParallel."""


class GradientReducer:
    """Averages gradients over all ranks in buckets, of which the first are sent while the backward pass still runs.

    A forward pass takes no part in it. So a step may call the model, its methods and its modules as often as it needs,
    and parameters may be frozen and unfrozen between steps, belong to any module, and lack a gradient on some ranks.

    Args:
        parameters: Returns the parameters of the optimizers that have replicas on all ranks.
        model: The module with these parameters, for their names.
        overlaps: Whether to send buckets while the backward pass runs. A backward pass that has collectives of its own
            could meet them in another order on a rank where a parameter has no gradient.
    """

    def __init__(self, parameters: Callable[[], Iterable[Parameter]], model: nn.Module, *, overlaps: bool) -> None:
        self._parameters, self._model = parameters, model
        self.overlaps: bool = overlaps
        self._sparse = find_sparse(model)
        self._trained: list[Parameter] = []
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[Parameter, Bucket] = {}
        self._handles: list[RemovableHandle] = []
        self._started = 0
        self._is_prepared = self._is_watching = False

    @contextlib.contextmanager
    def during_backward(self) -> Generator[None]:
        """Surround the backward pass that completes the gradients of a step.

        Raises:
            ModelError: There was one before in the same step.
        """
        if self._started:
            raise ModelError(
                "backward() was called twice for the last batch of a step, whose gradients are averaged over the "
                "processes after the first call. Add the losses, and call it once."
            )
        self._prepare()
        self._is_watching = self.overlaps
        try:
            yield
        finally:
            self._is_watching = False

    def finish(self) -> None:
        """Average the gradients of all parameters that require one. A collective.

        A gradient that is None counts as zeros, and stays None if it is None on all ranks. Only a rank on which one is
        None reads from the device.

        Raises:
            ModelError: A gradient is sparse, and its parameter does not belong to an embedding with `sparse=True`; or
                it belongs to one and the gradient is not sparse.
        """
        if not self._is_prepared:  # the gradients were computed by hand
            self._prepare()
        for bucket in self._buckets[self._started :]:
            self._start(bucket)
        for bucket in self._buckets:
            bucket.finish()
        for parameter in self._trained:
            if parameter in self._sparse:
                if parameter.grad is not None and not parameter.grad.is_sparse:
                    raise ModelError(
                        f"The gradient of {join_names(self._model, [parameter])} is not sparse, although its embedding "
                        "has sparse=True: the parameter is used elsewhere, too. Use sparse=False."
                    )
                average_sparse(parameter)
        self._started, self._is_prepared = 0, False

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _prepare(self) -> None:
        """Prepare the buckets for a step. If other parameters are trained than before, make them again."""
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        if len(trained) != len(self._trained) or not all(map(operator.is_, trained, self._trained)):
            self._make_buckets(trained)
        for bucket in self._buckets:
            bucket.missing = set(bucket.parameters)
        self._is_prepared = True

    def _make_buckets(self, trained: list[Parameter]) -> None:
        self.close()
        self._trained = trained
        self._buckets = make_buckets([parameter for parameter in trained if parameter not in self._sparse])
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]
            for parameter in self._bucket_of
        ]

    def _count(self, parameter: Parameter) -> None:
        """Start the buckets whose gradients are complete. All ranks start them in the same order."""
        if not self._is_watching:
            return
        bucket = self._bucket_of[parameter]
        if bucket.is_started:
            raise ModelError(
                f"The backward pass changed the gradient of {join_names(self._model, [parameter])} after it was sent "
                "to the other processes. Checkpoint activations with use_reentrant=False, as GradCheckpointMixin does."
            )
        bucket.missing.discard(parameter)
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._start(self._buckets[self._started])
            self._started += 1

    def _start(self, bucket: Bucket) -> None:
        if sparse := [p for p in bucket.parameters if p.grad is not None and p.grad.is_sparse]:
            raise ModelError(
                f"The gradient of {join_names(self._model, sparse)} is sparse. Several processes average sparse "
                "gradients of nn.Embedding and nn.EmbeddingBag with sparse=True alone. Use one of these modules, or "
                "sparse=False."
            )
        bucket.start()


class OutsideModel:
    """What replicas of trained modules outside of the model need, if a library reduces the gradients of the model.

    Args:
        model: The model, wrapped or sharded already.
        trained: The model, joined with these modules.
        slots: The optimizers.
        device: The device of this rank.
    """

    def __init__(
        self, model: nn.Module, trained: nn.Module, slots: Sequence[OptimizerSlot], device: torch.device
    ) -> None:
        """Copy rank 0's parameters and buffers of the modules to all ranks. A collective."""
        self._own, self._slots = {*model.parameters(), *model.buffers()}, slots
        broadcast_tensors((t for t in (*trained.parameters(), *trained.buffers()) if t not in self._own), device)
        self._reducer = None if trained is model else GradientReducer(self._parameters, trained, overlaps=False)

    def reduce(self) -> None:
        """Average the gradients of a step. A collective, if there are such modules."""
        if self._reducer is not None:
            self._reducer.finish()

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        if self._reducer is not None:
            self._reducer.close()

    def _parameters(self) -> list[Parameter]:
        return [parameter for parameter in all_parameters(self._slots) if parameter not in self._own]


class Bucket:
    """Parameters of one dtype on one device, whose gradients are averaged together.

    Attributes:
        missing: Parameters whose gradients the backward pass has not computed yet.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = parameters
        self.missing: set[Parameter] = set()
        self._work: dist.Work | None = None
        self._sizes = [*(parameter.numel() for parameter in parameters), len(parameters)]

    @property
    def is_started(self) -> bool:
        """Whether the gradients are being averaged."""
        return self._work is not None

    def start(self) -> None:
        """Start to average the gradients, and how many ranks have each of them."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        is_given = [p.grad is not None for p in self.parameters]
        self._is_complete = all(is_given)
        given = torch.ones(len(is_given), dtype=gradients[0].dtype, device=gradients[0].device)
        if not self._is_complete:  # otherwise nothing is copied to the device, which would wait for it
            given.copy_(torch.tensor(is_given, device="cpu"))
        self._values = torch.cat([*(gradient.detach().reshape(-1) for gradient in gradients), given])
        self._values /= dist.get_world_size()
        self._work = dist.all_reduce(self._values, async_op=True)

    def finish(self) -> None:
        """Wait for the averages, and set the gradients to them."""
        assert self._work is not None
        self._work.wait()
        *averages, given = torch.split(self._values, self._sizes)
        is_given = [True] * len(averages) if self._is_complete else (given != 0).tolist()
        for parameter, average, anywhere in zip(self.parameters, averages, is_given, strict=True):
            if parameter.grad is not None:
                parameter.grad.detach().copy_(average.view_as(parameter))
            elif anywhere:
                parameter.grad = average.view_as(parameter).clone()
        del self._values
        self._work = None


def make_buckets(parameters: Sequence[Parameter]) -> list[Bucket]:
    """Divide parameters into buckets, the last ones first: a backward pass completes their gradients first."""
    full: list[list[Parameter]] = []
    filling: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for parameter in reversed(parameters):
        kind = parameter.dtype, parameter.device
        bucket = filling.setdefault(kind, [])
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= BUCKET_BYTES:
            full.append(filling.pop(kind))
    return [Bucket(bucket) for bucket in chain(full, filling.values())]


def average_sparse(parameter: Parameter) -> None:
    """Average a sparse gradient over all ranks. A collective. It stays None if no rank has a row of it."""
    gradient = parameter.grad
    if gradient is None:
        indices = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
        rows = parameter.detach()[:0]
        gradient = torch.sparse_coo_tensor(indices, rows, parameter.shape, check_invariants=False)
    total = gradient.coalesce() / dist.get_world_size()
    dist.all_reduce(total)
    if parameter.grad is not None or total.coalesce().values().shape[0]:
        parameter.grad = total


def find_sparse(model: nn.Module) -> set[Parameter]:
    """Return the parameters of embeddings with `sparse=True`."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return {parameter for module in embeddings if module.sparse for parameter in module.parameters(recurse=False)}
