"""Batch norm over the global batch."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import cast

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.model.batch_norm import find_batch_norms, global_batch_norm
from ptacc.model.patching import Forward, patched_forwards
from ptacc.run.run import Run


class SyncBatchNormMixin(Mixin):
    """Synchronises batch norm layers: in training, mean and variance are computed over the batches of all ranks.

    Losses, gradients and running statistics equal those of a single process with the global batch. Without this mixin
    each rank normalises by its own batch, so results depend on the number of ranks. In contrast to
    `torch.nn.SyncBatchNorm`, CPUs are supported, batches may differ in size between ranks, and padding batches do not
    count. Evaluation uses the running statistics, as always.

    Options:
        sync_batch_norm: Whether to synchronise. A single process computes as without this mixin.

    Hooks: `around_run`.

    Combines with: everything. With gradient accumulation, each batch of a step has its own statistics.

    Source: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> from ptacc import SyncBatchNormMixin, Trainer
        >>> class MyTrainer(SyncBatchNormMixin, Trainer):
        ...     pass
    """

    sync_batch_norm: bool = True

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        run = self.run
        is_needed = self.sync_batch_norm and not self._distributed.is_single_process
        norms = find_batch_norms(self.unwrapped_model, type(self).__name__) if is_needed else []
        # Patched before the other mixins, so that their patches wrap this one.
        patched = patched_forwards(norms, lambda norm, local: synced_forward(norm, local, run))
        with patched, super().around_run():
            yield


def synced_forward(norm: _BatchNorm, local: Forward, run: Run) -> Forward:
    """Return a forward for `norm` that normalises by the global batch in training steps, and is `local` elsewhere."""

    def forward(input: Tensor) -> Tensor:  # noqa: A002  # the name of torch's argument
        if run.batch is not None and norm.training:
            norm._check_input_dim(input)  # type: ignore[no-untyped-call]  # noqa: SLF001  # as torch's forward does
            replica_size = run.distributed.replica_size
            return global_batch_norm(input, norm, is_padding=run.batch.is_padding, replica_size=replica_size)
        return cast(Tensor, local(input))

    return forward
