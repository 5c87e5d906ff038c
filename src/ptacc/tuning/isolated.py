"""An isolated copy of a trainer and a part of its data, for searches and assertions: training has no side effects."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ptacc.core.base import TrainerState
from ptacc.data.dataloader_config import check_dataset
from ptacc.data.loading import find_epoch_owners
from ptacc.errors import DataError, NestedRunError
from ptacc.loop.loop import TrainingLoop
from ptacc.mixins.lr_scheduler import LRSchedulerMixin
from ptacc.model.gradients import discard_gradients
from ptacc.model.modes import get_modes, set_modes
from ptacc.model.optimizer_state import save_settings
from ptacc.model.option_modules import find_option_modules
from ptacc.model.state_dict import copy_to_host, load_optimizer_state
from ptacc.rng import derive_seed, preserved_streams, seed_everything
from ptacc.types.aliases import T
from ptacc.types.protocols import SizedDataset, Stateful

AnyLoop: TypeAlias = TrainingLoop[Any, Any, nn.Module, Any]
Restore: TypeAlias = Callable[[], object]

SEED = 0
"""The seed of the copy's runs, so that a second search or assertion gives the same result."""
OVERRIDES: Mapping[str, object] = {
    "is_isolated": True,
    "history_file": None,
    "make_seed": lambda: SEED,
    "find_resume_state": lambda: None,
    "save_run_state": lambda: None,
    "save_on_exception": lambda _: None,
    "stop_signals": frozenset,
    "should_stop": lambda: None,
    "monitors": lambda: (),
    "all_callbacks": lambda: (),
    "print": lambda *_: None,
}
"""Attributes of the copy. They take precedence over its class, so they replace the hooks of all mixins."""


@contextlib.contextmanager
def isolated_copy(trainer: AnyLoop, *data: object) -> Generator[AnyLoop]:
    """Yield a copy of a trainer to train, and restore after the block everything that the training changed.

    The copy shares the trainer's model, optimizer, options and mixins. Its runs resume nothing, save nothing, handle no
    signals, call no callbacks, print nothing, and end only at their planned length. A mixin that writes files or sends
    reports in other hooks has to check `is_isolated`.

    Args:
        trainer: The trainer to copy.
        data: Datasets, mappings of datasets, loaders and samplers that the copy will read. None is skipped.

    Raises:
        NestedRunError: The trainer is running.
    """
    if trainer.is_running:
        raise NestedRunError(
            f"A search or an assertion within a run of {type(trainer).__name__}: call it before or after the run."
        )
    copied = copy.copy(trainer)
    vars(copied).update(OVERRIDES)
    for field in dataclasses.fields(copied):
        if not field.init and field.default_factory is not dataclasses.MISSING:
            vars(copied)[field.name] = field.default_factory()  # a new state, like that of a new trainer
    with preserve_state(trainer, data):
        yield copied


@contextlib.contextmanager
def search_copy(trainer: AnyLoop, *data: object) -> Generator[AnyLoop]:
    """Yield an `isolated_copy` with a constant learning rate, and seed the global generators for the block."""
    with isolated_copy(trainer, *data) as copied:
        if isinstance(copied, LRSchedulerMixin):
            copied.create_scheduler = lambda optimizer, _: ConstantLR(optimizer, factor=1.0)
            copied.create_scheduler_of = {}
            copied.scheduler_interval = "step"
        seed_everything(derive_seed(SEED, copied.distributed.replica))
        yield copied


def repeat(data: SizedDataset[T], samples: int, length: int) -> Dataset[T]:
    """Return the first samples of a dataset, repeated in order up to a length."""
    return Subset(cast(Dataset[T], data), [index % samples for index in range(length)])


def check_map_style(function: str, argument: str, data: object) -> None:
    """Raise `DataError` for data without a length and an index: a stream, or a ready loader."""
    if isinstance(data, DataLoader | IterableDataset):
        raise DataError(
            f"{function}({argument}={type(data).__name__}(...)): makes its own batches of some of the samples, so it "
            "needs a dataset with a length and an index. Give `list(itertools.islice(stream, 100))`, or the loader's "
            "dataset and collate_fn."
        )
    check_dataset(data)


# ---- saving and restoring what a run changes


@contextlib.contextmanager
def preserve_state(trainer: AnyLoop, data: Iterable[object]) -> Generator[None]:
    """Save the state of a trainer's options and optimizers, of data and of the global generators, and restore it.

    Options that are modules, generators or `Stateful` are saved, and so are the positions of datasets, loaders and
    samplers, and the attributes of those with a `set_epoch`. The saved copies are on the host, so that the block has
    all of the device's memory.
    """
    options = list(vars(trainer).values())
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_streams(trainer.device))
        for state in (option for option in options if isinstance(option, TrainerState)):
            stack.callback(save_validity(state, trainer.trained_modules))
        for module in find_option_modules(trainer).values():
            stack.callback(save_module(module))
        for slot in trainer.optimizer_slots():
            stack.callback(save_optimizer(slot.optimizer))
        for part in (*options, *find_stateful_parts(data)):
            if not isinstance(part, nn.Module | Optimizer | type):
                stack.callback(save_position(part))
        for owner in (owner for part in find_stateful_parts(data) for owner in find_epoch_owners(part)):
            stack.callback(save_attributes(owner))
        yield


def save_module(module: nn.Module) -> Restore:
    """Save parameters, buffers, extra state and flags of a module. Its gradients are saved and cleared."""
    parameters = [(p, copy_to_host(p), p.grad, p.requires_grad) for p in module.parameters()]
    buffers = [
        (owner, name, copy_to_host(buffer))
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
    ]
    extra_states = [
        (owner, copy.deepcopy(owner.get_extra_state()))
        for owner in module.modules()
        if type(owner).get_extra_state is not nn.Module.get_extra_state
    ]
    modes = get_modes(module)
    discard_gradients(module)

    @torch.no_grad()
    def restore() -> None:
        set_modes(modes)  # before the weights: a module's `train(mode)` may change them
        for parameter, value, gradient, requires_grad in parameters:
            if parameter.shape == value.shape:  # else an error left the weights with the engine
                parameter.copy_(value)
                parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for owner, name, buffer in buffers:
            setattr(owner, name, buffer.to(getattr(owner, name).device))
        for owner, state in extra_states:
            owner.set_extra_state(state)

    return restore


def save_validity(state: TrainerState, model: nn.Module) -> Restore:
    """Save whether the averages of the weights belong to the present weights, which are written to and restored."""
    are_current = [averages for averages in state.averages.values() if averages.are_current(model)]

    def restore() -> None:
        for averages in are_current:
            averages.mark_current(model)

    return restore


def save_optimizer(optimizer: Optimizer) -> Restore:
    """Save the state, the settings and the attributes of an optimizer."""
    state = copy_to_host(optimizer.state_dict())
    restore_settings = save_settings(optimizer)
    attributes = set(vars(optimizer))

    def restore() -> None:
        load_optimizer_state(optimizer, state)
        restore_settings()
        for name in vars(optimizer).keys() - attributes:
            delattr(optimizer, name)  # a scheduler of torch's wraps `step`

    return restore


def save_position(part: object) -> Restore:
    """Save the state of a dataset, a loader, a sampler or an option, or that of its generator, if it has one."""
    if isinstance(part, Stateful):
        return functools.partial(part.load_state_dict, copy.deepcopy(part.state_dict()))
    generator = part if isinstance(part, torch.Generator) else getattr(part, "generator", None)
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    return lambda: None


def save_attributes(owner: object) -> Restore:
    """Save which values the attributes of a dataset or sampler have. What is changed within a value is not restored."""
    if isinstance(owner, Stateful) or not hasattr(owner, "__dict__"):
        return lambda: None
    attributes = vars(owner).copy()

    def restore() -> None:
        vars(owner).clear()
        vars(owner).update(attributes)

    return restore


def find_stateful_parts(data: Iterable[object]) -> list[object]:
    """Return the data itself, the values of mappings, and the parts of loaders and batch samplers, each once."""
    parts: list[object] = []
    for part in data:
        parts += part.values() if isinstance(part, Mapping) else [part]
    for loader in [part for part in parts if isinstance(part, DataLoader)]:
        parts += [loader.dataset, loader.sampler, loader.batch_sampler]
    parts += [getattr(part, "sampler", None) for part in parts]
    return list({id(part): part for part in parts if part is not None}.values())
