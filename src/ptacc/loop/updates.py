"""A training loop with several updates per step, each of one optimizer on a loss of its own."""

from __future__ import annotations

import warnings
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, NoReturn, final

from typing_extensions import override

from ptacc.composition.roles import Role
from ptacc.core.batch_hooks import BatchHooks
from ptacc.core.callback import overrides
from ptacc.core.checks import check_output
from ptacc.data.transfer import Transfer
from ptacc.engines.base import OptimizerSlot
from ptacc.errors import CompositionError, LossError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.run.run import Run
from ptacc.run.state import StateKey
from ptacc.run.step_result import NO_LOSS, StepResult
from ptacc.run.window import Window
from ptacc.types.aliases import BatchT, ModelT, OutputT, SampleT
from ptacc.types.outputs import StepOutput, Update
from ptacc.validation import did_you_mean

UPDATES: StateKey[Counter[str]] = StateKey("updates", saved=False)
"""Number of updates by optimizer, since the run was started or resumed."""
MANY_UPDATES = 100
"""Number of updates after which an optimizer without one is reported."""


class MultiUpdateLoop(TrainingLoop[BatchT, OutputT, ModelT, SampleT], Generic[BatchT, OutputT, ModelT, SampleT]):
    """A training loop whose step consists of several updates: for GANs, actors with critics, and alternating methods.

    The option `optimizer` is an `OptimizerDict`. `train_updates` yields an `Update` for each of a step's updates. The
    loop computes its gradients, for the parameters of its optimizer alone, averages them over the processes, clips
    them and steps the optimizer. Then `train_updates` continues, with the new weights.

    With gradient accumulation, an update is one of all batches of the step: `train_updates` runs for each of them, and
    the runs advance together. Each yields the same updates in the same order, on all processes.

    The forward pass runs in the precision of `AMPMixin`, whatever it calls. Losses are reported as `<optimizer>/loss`,
    and what hooks log of an update as `<optimizer>/<name>`. The training loss is the sum of the losses of a step.

    Example:
        >>> from collections.abc import Iterator
        >>> import torch
        >>> from torch import Tensor, nn
        >>> from ptacc import MultiUpdateLoop, OptimizerDict, Update
        >>> class ActorCritic(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.actor, self.critic = nn.Linear(2, 1), nn.Linear(1, 1)
        >>> class Alternating(MultiUpdateLoop[Tensor, None, ActorCritic]):
        ...     def train_updates(self, batch: Tensor) -> Iterator[Update[None]]:
        ...         action = self.model.actor(batch)
        ...         yield Update("critic", loss=(self.model.critic(action.detach()) - batch.sum(1)).square().mean())
        ...         yield Update("actor", loss=-self.model.critic(action).mean())
        ...
        ...     def eval_step(self, batch: Tensor) -> StepOutput[None]:
        ...         return StepOutput(loss=-self.model.critic(self.model.actor(batch)).mean(), outputs=None)
    """

    _role: ClassVar[Role] = "loop"

    @abstractmethod
    def train_updates(self, batch: BatchT) -> Iterator[Update[OutputT]]:
        """Yield the updates of a step for one batch. Write it as a generator function.

        What follows a `yield` uses the weights after that update.
        """

    @final
    @override
    def train_step(self, batch: BatchT) -> StepOutput[OutputT]:
        raise AssertionError("train_updates takes its place")

    @override
    def eval_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Default hook: compute the loss and the outputs of one batch in evaluation. Define it to evaluate."""
        raise_no_eval_step(type(self).__name__)

    @override
    def check_options(self) -> None:
        check_no_train_step(type(self))

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if not self.run.engine.can_update_separately:
            raise OptionError(
                f"{type(self).__name__}: its engine has one update per step, of all optimizers. For several updates, "
                "leave FSDPMixin, TensorParallelMixin, DeepSpeedMixin and DDPMixin out."
            )
        self.run[UPDATES] = Counter()
        if self.run.eval_data and not overrides(self, MultiUpdateLoop, "eval_step"):
            raise_no_eval_step(type(self).__name__)

    @override
    def on_run_end(self) -> None:
        updates = self.run[UPDATES]
        missing = [slot.label for slot in self.run.engine.slots if not updates[slot.label]]
        if missing and updates.total() >= MANY_UPDATES and self.distributed.is_main:
            warnings.warn(
                f"{type(self).__name__}.train_updates yielded {updates.total()} updates in this run, and none of "
                f"{', '.join(missing)}.",
                stacklevel=2,
            )
        super().on_run_end()

    @override
    def _step(self, run: Run, window: Window[BatchT], transfer: Transfer) -> tuple[StepResult, bool]:
        """Take one step over the batches of a window. Return whether a gradient scaler did not skip all its updates."""
        step = run.begin_step(window)
        batches = [transfer.to_device(host.data) for host in window.batches]
        parts = [self.train_updates(batch) for batch in batches]
        outputs: list[StepOutput[OutputT] | None] = [None] * len(batches)
        happened = []
        while (first := self._agree(run, window, parts)) is not None:
            slot = find_slot(self, first.optimizer, run.engine.slots)
            with run.engine.updating(slot):
                for index, part in enumerate(parts):
                    update = self._advance(run, window, index, part) if index else first
                    if update is None or update.optimizer != first.optimizer:
                        raise_different(type(self).__name__, "batches", [first, update])
                    outputs[index] = self._backward(run, window, step, index, update) or outputs[index]
                happened.append(self._update(run, step, slot))
        run.batch = None
        if not happened:
            raise LossError(f"{type(self).__name__}.train_updates yielded no update in step {step.step}.")
        self._report_outputs(run, window, batches, outputs)
        return step, any(happened)

    def _agree(
        self, run: Run, window: Window[BatchT], parts: list[Iterator[Update[OutputT]]]
    ) -> Update[OutputT] | None:
        """Return the next update of the first batch; None if there is none, in any batch. A collective."""
        owner, distributed = type(self).__name__, run.distributed
        update = self._advance(run, window, 0, parts[0])
        code = zlib.crc32(b"" if update is None else update.optimizer.encode())
        if distributed.sum([code]) != [code * distributed.world_size]:
            raise_different(owner, "processes", distributed.gather(update and Update(update.optimizer, NO_LOSS)))
        for index, part in enumerate(parts[1:] if update is None else (), start=1):
            if (more := self._advance(run, window, index, part)) is not None:
                raise_different(owner, "batches", [None, more])
        return update

    def _advance(
        self, run: Run, window: Window[BatchT], index: int, part: Iterator[Update[OutputT]]
    ) -> Update[OutputT] | None:
        """Continue the run of `train_updates` for one batch, up to its next update."""
        run.batch = window.batches[index]
        with self.accelerator.autocast():
            update: object = next(part, None)
        if update is None or isinstance(update, Update):
            return update
        raise LossError(
            f"{type(self).__name__}.train_updates yielded a {type(update).__name__}: it must yield "
            'Update("<optimizer>", loss=...).'
        )

    def _backward(
        self, run: Run, window: Window[BatchT], step: StepResult, index: int, update: Update[OutputT]
    ) -> StepOutput[OutputT] | None:
        """Compute the gradients of an update for one batch. Return its outputs, if it has any."""
        output = update.as_output()
        check_output(type(self).__name__, output, run.device)
        loss = window.scale_loss(index, output)
        with run.engine.around_batch(is_last=index == len(window.batches) - 1):
            run.distributed.count_progress()
            self.backward(loss)
        step.add_update(f"{update.optimizer}/loss", loss.detach(), output.logged, window.weight(index))
        return None if update.outputs is None else output

    def _update(self, run: Run, step: StepResult, slot: OptimizerSlot) -> bool:
        run[UPDATES][slot.label] += 1
        run.engine.unscale_gradients()
        logged, step.logged = step.logged, {}
        self.on_gradients_ready(step)
        step.logged = logged | {f"{slot.label}/{name}": value for name, value in step.logged.items()}
        return run.engine.update()

    def _report_outputs(
        self, run: Run, window: Window[BatchT], batches: list[BatchT], outputs: list[StepOutput[OutputT] | None]
    ) -> None:
        if not run.retains_outputs:
            return
        for host, batch, output in zip(window.batches, batches, outputs, strict=True):
            if output is None:
                raise LossError(
                    f"{type(self).__name__}.train_updates yields no update with outputs, which on_batch_end needs, as "
                    "of MetricsMixin. Give one: Update(..., outputs=...)."
                )
            if not host.is_padding:
                self.on_batch_end(batch, output)


def check_no_train_step(trainer: type) -> None:
    """Raise `CompositionError` for a mixin that refines `train_step`, which is not called."""
    for base in trainer.__mro__[: trainer.__mro__.index(MultiUpdateLoop)]:
        if "train_step" in vars(base):
            raise CompositionError(
                f"{trainer.__name__}: {base.__name__} refines train_step, and a MultiUpdateLoop has train_updates. "
                f"Leave {base.__name__} out."
            )


def raise_no_eval_step(owner: str) -> NoReturn:
    """Raise `CompositionError` for an evaluation or prediction of a loop that does not define `eval_step`."""
    raise CompositionError(
        f"{owner} has no eval_step, and evaluations and predictions need one: a MultiUpdateLoop does not choose among "
        "the losses of its updates. Define eval_step(batch), which returns a StepOutput."
    )


def find_slot(trainer: BatchHooks[BatchT, OutputT], label: str, slots: Sequence[OptimizerSlot]) -> OptimizerSlot:
    """Return the optimizer of an update."""
    for slot in slots:
        if slot.label == label:
            return slot
    labels = [slot.label for slot in slots]
    raise LossError(
        f"{type(trainer).__name__}.train_updates yielded Update({label!r}), and the optimizers are "
        f"{', '.join(labels)}. {did_you_mean(label, labels)}".rstrip()
    )


def raise_different(owner: str, what: str, updates: Sequence[Update[Any] | None]) -> NoReturn:
    """Raise `LossError` for batches or processes that yield different updates, or some of them none."""
    names = ["none" if update is None else update.optimizer for update in updates]
    raise LossError(
        f"{owner}.train_updates: the {what} of a step yield different updates: {', '.join(names)}. All have to yield "
        "the same ones in the same order. To leave one out in some steps, decide by self.progress.steps."
    )
