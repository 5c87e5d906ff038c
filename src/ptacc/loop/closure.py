"""A step of an optimizer that takes a closure, which computes the gradients of the step again."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ptacc.data.keyed_dataset import read_versions
from ptacc.data.transfer import Transfer
from ptacc.engines.base import all_parameters, join_trained
from ptacc.engines.default import clear_gradients
from ptacc.errors import DataError
from ptacc.rng import RandomStreams
from ptacc.run.run import Run
from ptacc.run.step_result import NO_LOSS, StepResult
from ptacc.run.window import Window
from ptacc.tensors.structures import iterate_tensors


class ComputeGradients(Protocol):
    """Computes the gradients of a step."""

    def __call__(
        self, run: Run, window: Window[Any], transfer: Transfer, step: StepResult, *, is_repeated: bool = ...
    ) -> None:
        """Add the losses to `step`. If repeated, do not call `on_batch_end`."""


def step_by_closure(
    compute_gradients: ComputeGradients, run: Run, window: Window[Any], transfer: Transfer
) -> tuple[StepResult, bool]:
    """Take one optimizer step over the batches of a window. Its optimizer may compute the gradients again.

    The gradients are computed before `optimizer.step(closure)`, since some optimizers need them there. Others call the
    closure first: if the weights and gradients are still the same by then, nothing is computed. The batches stay on the
    device until the end of the step.

    Returns:
        What the first computation reported, and whether the optimizer stepped.

    Raises:
        DataError: A batch was changed in place, and is needed again.
    """
    step = run.begin_step(window)
    window = replace(window, batches=[replace(host, data=transfer.to_device(host.data)) for host in window.batches])
    resident, tensors = Transfer(run.device), [*iterate_tensors([host.data for host in window.batches])]
    versions = read_versions(tensors)
    start = ForwardState(join_trained(run.model, run.engine.slots), run.device)
    compute_gradients(run, window, resident, step)
    computed: Gradients | None = Gradients(all_parameters(run.engine.slots))

    def closure() -> Tensor:
        nonlocal computed
        is_current, computed = computed is not None and computed.are_current(), None
        if is_current:
            return step.loss
        if read_versions(tensors) != versions:
            raise DataError(
                "train_step changed a batch in place, and the optimizer's closure computes the step again from it. "
                "Change a copy: `inputs = inputs * 0.5` in place of `inputs *= 0.5`."
            )
        again = replace(step, loss=NO_LOSS, logged={}, weights={})
        for slot in run.engine.slots:
            clear_gradients(slot.optimizer)
        with torch.enable_grad(), start.repeated():
            compute_gradients(run, window, resident, again, is_repeated=True)
        return again.loss

    return step, run.engine.update(closure)


class ForwardState:
    """What a forward pass changes besides gradients: the global generators, and the buffers of the model.

    Args:
        model: The model.
        device: Its device. Reading the state of its generator synchronizes it.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device, self._streams = model, device, RandomStreams(device)
        self._generators = self._streams.state_dict()
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    @contextlib.contextmanager
    def repeated(self) -> Generator[None]:
        """Restore the state for the block. After it, restore the state from before the block."""
        present = ForwardState(self._model, self._device)
        self._restore()
        try:
            yield
        finally:
            present._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        self._streams.load_state_dict(self._generators)
        for name, buffer in self._model.named_buffers():
            saved = self._buffers.get(name)
            if saved is not None and saved.shape == buffer.shape:  # else the forward pass has made it
                buffer.copy_(saved)


class Gradients:
    """The gradients of parameters, with the weights that they were computed for.

    Args:
        parameters: The parameters. Their weights are copied.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        self._computed = [(p, p.detach().clone(), g, version_of(g)) for p, g in zip(parameters, gradients, strict=True)]

    def are_current(self) -> bool:
        """Return whether the parameters have the same weights, and the same gradients. Reads from the device."""
        return all(
            parameter.grad is gradient and version_of(gradient) == version and torch.equal(parameter, weights)
            for parameter, weights, gradient, version in self._computed
        )


def version_of(gradient: Tensor | None) -> int:
    """Return how often a tensor was changed in place."""
    return -1 if gradient is None else gradient._version  # noqa: SLF001  # torch has no public name for it
