"""Rows of all ranks in one tensor, through which gradients flow back to the rank that each row is from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.model.batch_norm import all_reduce_sum


class GatherRows(torch.autograd.Function):
    """Gathers the rows of all ranks. The gradient of a row is the sum of its gradients on all ranks."""

    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int], rank: int, replica_size: int) -> Tensor:
        """Gather rows.

        Args:
            ctx: The context of the function.
            rows: `(n, ...)`, this rank's rows.
            counts: Number of rows that each rank gives, its first ones.
            rank: Index of this rank.
            replica_size: Number of consecutive ranks that have the same rows, which are taken from the first of them.
        """
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: counts[rank]] = rows[: counts[rank]]
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        leaders = range(0, len(counts), replica_size)
        own = rank - rank % replica_size
        ctx.start, ctx.count = sum(counts[leader] for leader in leaders if leader < own), counts[own]
        ctx.shape, ctx.replica_size = rows.shape, replica_size
        return torch.cat([parts[leader][: counts[leader]] for leader in leaders])

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = all_reduce_sum(gradients[0])
        own = total.new_zeros(ctx.shape)
        own[: ctx.count] = total[ctx.start : ctx.start + ctx.count] / ctx.replica_size
        return own, None, None, None


def gather_rows(rows: Tensor, distributed: DistributedRuntime, *, is_padding: bool) -> tuple[Tensor, Tensor]:
    """Concatenate the rows of all replicas of the model, in their order. A collective, and so is the backward pass.

    Args:
        rows: `(n, ...)`; `n` may differ between replicas.
        distributed: The ranks.
        is_padding: Whether the rows are of a padding batch, and left out.

    Returns:
        All rows `(total, ...)`, and the indices `(n,)` of this rank's own rows among them: zeros if they were left out.

    Raises:
        DataError: A tensor is a scalar, or the tensors differ in more than the first dimension.
    """
    if distributed.replicas == 1:
        check_layouts([(rows.shape, rows.dtype)])
        return rows, torch.arange(len(rows), device=rows.device)
    layouts = distributed.gather((rows.shape, rows.dtype, is_padding))
    check_layouts([(shape, dtype) for shape, dtype, _ in layouts])
    counts = [0 if is_left_out else shape[0] for shape, _, is_left_out in layouts]
    size = distributed.replica_size
    gathered = cast(Tensor, GatherRows.apply(rows, counts, distributed.rank, size))  # type: ignore[no-untyped-call]
    if is_padding:
        return gathered, torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    start = sum(counts[: distributed.leader : size])
    return gathered, torch.arange(start, start + len(rows), device=rows.device)


def check_layouts(layouts: Sequence[tuple[torch.Size, torch.dtype]]) -> None:
    """Raise `DataError` unless the tensors of all ranks can be concatenated along their first dimension."""
    if not all(len(shape) for shape, _ in layouts):
        raise DataError("gather_with_grad() takes tensors with a first dimension: got a scalar. Use gather() for it.")
    if len({(shape[1:], dtype) for shape, dtype in layouts}) > 1:
        found = ", ".join(f"{tuple(shape)} of {dtype}" for shape, dtype in layouts)
        raise DataError(f"gather_with_grad(): tensors may differ in the first dimension only: got {found}.")
