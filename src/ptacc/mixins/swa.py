"""Stochastic weight averaging."""

from __future__ import annotations

import warnings

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ptacc.core.batch_hooks import BatchMixin
from ptacc.data.wrappers import fill_each
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.model.averaging import AveragedWeights
from ptacc.model.norms import CopiedStatistics, cumulative_statistics, find_tracking_norms
from ptacc.rng import preserved_streams
from ptacc.run.state import StateKey
from ptacc.tensors.structures import to_device
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import SupportsSyncBatchNorm
from ptacc.validation import check_at_least

SWA_STATE: StateKey[AveragedWeights] = StateKey("swa")


class SWAMixin(BatchMixin[BatchT, OutputT]):
    """Averages the weights at the ends of the last epochs (SWA), and loads the average into the model after the run.

    The running statistics of batch norm layers do not match the averaged weights. They are recomputed in one more pass
    over the training data, like `torch.optim.swa_utils.update_bn`.

    Options:
        swa_start: The first epoch whose weights are averaged, counted from 1; None to disable averaging.
        swa_updates_batch_norm: Whether to recompute the running statistics of batch norm layers.

    Hooks: `on_run_start`, `on_epoch_end`, `on_run_end`.

    Combines with: everything. Use a schedule that ends with a constant, high learning rate, such as
    `torch.optim.swa_utils.SWALR`.

    Source: Izmailov et al., 2018, https://arxiv.org/abs/1803.05407

    Example:
        >>> from ptacc import SWAMixin, Trainer
        >>> class MyTrainer(SWAMixin, Trainer):
        ...     swa_start: int | None = 6
    """

    swa_start: int | None = None
    swa_updates_batch_norm: bool = True

    @override
    def check_options(self) -> None:
        if self.swa_start is not None:
            check_at_least(type(self).__name__, "swa_start", self.swa_start, 1)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.run[SWA_STATE] = AveragedWeights(self.trained_modules)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        if self.swa_start is not None and record.is_complete and record.epoch >= self.swa_start:
            average = self.run[SWA_STATE]
            average.update(self.trained_modules, weight=1 / (average.updates + 1))

    @override
    def on_run_end(self) -> None:
        if self.run[SWA_STATE].updates:
            self.run[SWA_STATE].sync_buffers(self.trained_modules, self.distributed.broadcast)
            self.run[SWA_STATE].copy_to(self.trained_modules)
            if self.swa_updates_batch_norm:
                self._update_batch_norm()
            for averages in self.run.averages().values():
                averages.copy_from(self.trained_modules)  # evaluations and exports after the run use these weights
        elif self.swa_start is not None and self.history.stop_reason is None and not self.is_isolated:
            warnings.warn(
                f"{type(self).__name__}(swa_start={self.swa_start}): no weights were averaged, since the run completed "
                f"{self.progress.epochs} epochs. It ends with its last weights. Set a smaller swa_start.",
                stacklevel=2,
            )
        super().on_run_end()

    def _update_batch_norm(self) -> None:
        """Recompute the running statistics of batch norm layers from the training data. A collective."""
        norms = find_tracking_norms(self.unwrapped_model)
        if not norms:
            return
        # Every rank runs padding batches too, and one for a batch that was left out on this rank alone, since
        # synchronised norms and sharded models communicate in the forward pass. The model is unwrapped, since the
        # forward of a wrapper may broadcast rank 0's statistics.
        is_synchronised = isinstance(self, SupportsSyncBatchNorm) and self.sync_batch_norm
        run, wrapped, streams = self.run, self.model, preserved_streams(self.device)
        self._set_model(self.unwrapped_model)
        try:
            with torch.no_grad(), streams, cumulative_statistics(norms):
                for host in fill_each(run.data.epoch(0), self._distributed):
                    run.batch = host if is_synchronised else None
                    with CopiedStatistics(norms if host.is_padding and not is_synchronised else []):
                        self.predict_step(to_device(host.data, self.device))
        finally:
            run.batch = None
            self._set_model(wrapped)
        if not is_synchronised:
            average_statistics(norms, self._distributed)


def average_statistics(norms: list[_BatchNorm], distributed: DistributedRuntime) -> None:
    """Average the running statistics over ranks, weighted by their numbers of batches. A collective."""
    if distributed.is_single_process:
        return
    share = int(distributed.is_replica_leader)  # all ranks of a replica have the same batches
    for norm in norms:
        mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert batches is not None
        for statistic in (mean, variance):
            *total, count = distributed.sum([*(statistic * batches * share).tolist(), int(batches) * share])
            if count:  # 0 if no rank has called this layer
                statistic.copy_(torch.tensor(total, dtype=torch.float64, device="cpu") / count)
        batches.fill_(distributed.sum([int(batches) * share])[0])
