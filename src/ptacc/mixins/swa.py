"""Stochastic weight averaging."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ptacc.core.batch_hooks import BatchMixin
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.model.averaging import AveragedWeights
from ptacc.rng import preserved_streams
from ptacc.run.state import StateKey
from ptacc.tensors.dtensor import is_dtensor
from ptacc.tensors.structures import to_device
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import SupportsSyncBatchNorm
from ptacc.validation import check_at_least

SWA_STATE: StateKey[AveragedWeights] = StateKey("swa")


class SWAMixin(BatchMixin[BatchT, OutputT]):
    """Averages the weights of the last epochs, with equal weight, and ends the run with the average.

    The statistics of batch norm belong to other weights then, so they are taken anew in a last pass over the
    training data, without gradients.

    Options:
        swa_start: The first epoch, counted from 1, at whose end the weights are taken into the average; None for none.
        swa_updates_batch_norm: Whether to make that last pass where the model has batch norm.

    Hooks: `on_run_start`, `on_epoch_end`, `on_run_end`.

    Combines with: everything. A schedule that ends high and flat suits it: `torch.optim.swa_utils.SWALR`.

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
        """Refuse an epoch before the first."""
        if self.swa_start is not None:
            check_at_least(type(self).__name__, "swa_start", self.swa_start, 1)

    @override
    def on_run_start(self) -> None:
        """Start an average of nothing."""
        super().on_run_start()
        self.run[SWA_STATE] = AveragedWeights(self.unwrapped_model)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        """Take the epoch's weights into the average."""
        super().on_epoch_end(record)
        if self.swa_start is not None and record.is_complete and record.epoch >= self.swa_start:
            average = self.run[SWA_STATE]
            average.update(self.unwrapped_model, weight=1 / (average.updates + 1))

    @override
    def on_run_end(self) -> None:
        """Put the average into the model."""
        if self.run[SWA_STATE].updates:
            self.run[SWA_STATE].exchange(self.unwrapped_model)
            if self.swa_updates_batch_norm:
                self._update_batch_norm()
        super().on_run_end()

    def _update_batch_norm(self) -> None:
        norms = norms_with_statistics(self.unwrapped_model)
        if not norms:
            return
        # With synchronised norms all processes call the model alike, phantoms included; else each for itself, and not
        # the wrapped one, which talks to the others in its forward. A model in shards does that, too.
        is_synchronised = isinstance(self, SupportsSyncBatchNorm) and self.sync_batch_norm
        is_sharded = any(is_dtensor(parameter) for parameter in self.unwrapped_model.parameters())
        run, wrapped, streams = self.run, self.model, preserved_streams(devices=self.device.type != "cpu")
        self._set_model(self.unwrapped_model)
        try:
            with torch.no_grad(), streams, cumulative(norms):
                for host in run.data.epoch(0):
                    run.batch = host if is_synchronised else None
                    if is_synchronised or not host.is_padding:
                        self.predict_step(to_device(host.data, self.device))
                    elif is_sharded:
                        with kept(norms):
                            self.predict_step(to_device(host.data, self.device))
        finally:
            run.batch = None
            self._set_model(wrapped)
        if not is_synchronised:
            average_over(norms, self._distributed)


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that track statistics; those that were set to eval mode are to keep theirs."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


@contextlib.contextmanager
def cumulative(norms: list[_BatchNorm]) -> Iterator[None]:
    """Have batch norms average all batches of the block with equal weight."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextlib.contextmanager
def kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Put the statistics of batch norms back after the block."""
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def average_over(norms: list[_BatchNorm], distributed: DistributedRuntime) -> None:
    """Average the statistics of the processes, by the number of batches that each has seen."""
    if distributed.is_single_process:
        return
    share = int(distributed.is_replica_leader)  # the others of a replica have seen the same
    for norm in norms:
        mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert batches is not None
        for statistic in (mean, variance):
            *total, seen = distributed.sum([*(statistic * batches * share).tolist(), int(batches) * share])
            if seen:  # else no process has called this norm
                statistic.copy_(torch.tensor(total, dtype=torch.float64) / seen)
        batches.fill_(distributed.sum([int(batches) * share])[0])
