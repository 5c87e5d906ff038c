"""Setting a run up: everything that it is given is checked before any weight is touched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Generic

from torch.utils.data import DataLoader

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.callback import overrides
from ptacc.core.checks import check_monitor, check_trainable
from ptacc.core.hooks import TrainerCore
from ptacc.data.batch import BatchSource
from ptacc.data.dataloader_config import DataLoaderConfig, check_dataset, limit_from_environment
from ptacc.data.sources import fingerprints, make_source
from ptacc.data.wrappers import level
from ptacc.distributed.stop_vote import StopConsensus
from ptacc.errors import DataError, OptionError
from ptacc.loop.evaluation import EvaluationLoop
from ptacc.run.history import RunHistory
from ptacc.run.run import Run
from ptacc.run.state import ResumeState
from ptacc.types.aliases import BatchT, OutputT, SampleT
from ptacc.types.arguments import EvalOptions, RunOptions
from ptacc.types.outputs import EvalResult
from ptacc.types.progress import Progress, RunPlan


class RunSetUp(EvaluationLoop[BatchT, OutputT, SampleT], Generic[BatchT, OutputT, SampleT]):
    """From the arguments of `train()` to the state of a run."""

    _role: ClassVar[Role] = "core"

    @hook("factory")
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        """Make the loader of a run. Its dataset, order and collate function are kept, its batches are dealt."""
        return request.build(shuffle=True)

    def _make_run(self, train_data: Any, eval_data: Any, options: RunOptions) -> Run:
        """Check everything that a run is given, and make its state; no weight is touched."""
        distributed = self._distributed
        self._state.runs += 1
        with distributed.propagate_failure("drawing a seed"):
            saved = self.find_resume_state()
            seed = distributed.broadcast(self.make_seed()) if saved is None else saved.seed
        with distributed.synced("the set-up of train()") as told:
            check_trainable(type(self).__name__, self.unwrapped_model, self.optimizer_slots())
            limit = limit_from_environment(options.limit_batches)
            loader = self._train_loader(train_data, options)
            data = make_source(loader, distributed, seed, data_is_sharded=options.data_is_sharded, limit=limit)
            eval_sets = self._run_eval_sources(eval_data, options, limit)
            values = self._reported_names(eval_sets)
            for watcher, monitored in self.monitors():
                check_monitor(monitored, values, watcher)
            told += [
                *fingerprints({"train": data}),
                *fingerprints(eval_sets),
                options.fingerprint(),
                f"accumulation_steps={self.accumulation_steps()}",
            ]
        with distributed.propagate_failure("setting a run up"):
            level([data, *eval_sets.values()])
            return Run(
                options=options,
                plan=self._plan(data, options, saved),
                seed=seed,
                engine=self.make_engine(),
                device=self.device,
                distributed=distributed,
                data=data,
                eval_data=eval_sets,
                history=RunHistory(self.history_file if distributed.rank == 0 else None),
                consensus=StopConsensus(distributed, options.stop_check_every),
                accumulation_steps=self.accumulation_steps(),
                value_names=values,
                invariants={
                    **self.resume_invariants(),
                    "data": data.partition_scheme.of,
                    "batch_size": data.partition_scheme.how,
                },
                resume_state=saved,
            )

    def _run_eval_sources(self, data: Any, options: RunOptions, limit: int | None) -> dict[str, BatchSource]:
        if data is None:
            return {}
        evaluation = EvalOptions(
            per_device_batch_size=options.per_device_batch_size,
            dataloader_kwargs=options.eval_dataloader_kwargs,
        )
        return self._eval_sources(data, options.collate_fn, evaluation, limit)

    def _train_loader(self, data: Any, options: RunOptions) -> DataLoader[object]:
        check_dataset(data)
        if not isinstance(data, DataLoader):
            kwargs = options.train_dataloader_kwargs
            request = DataLoaderConfig(data, options.per_device_batch_size, options.collate_fn, kwargs, self.device)
            return self.make_train_dataloader(request)
        if options.per_device_batch_size is not None or options.train_dataloader_kwargs or options.collate_fn:
            raise OptionError(
                "train() got a ready DataLoader, and per_device_batch_size, train_dataloader_kwargs or collate_fn "
                "beside it: the loader has its own. Give the dataset instead, or leave them out."
            )
        return data

    def _plan(self, data: BatchSource, options: RunOptions, saved: ResumeState | None) -> RunPlan:
        """Work out how long the run is, in steps."""
        num_batches = data.num_batches()
        if num_batches == 0:
            raise DataError(
                "The training data gives no batch: it is empty, or drop_last dropped the only one. Give smaller "
                "batches, or keep it."
            )
        if num_batches is None and options.max_steps is None and options.max_time is None:
            raise OptionError(
                f"train(num_epochs={options.num_epochs}) on data without a length: nobody can tell how many steps that "
                "is. Give max_steps or max_time, or give the dataset a __len__."
            )
        steps = None if num_batches is None else math.ceil(num_batches / self.accumulation_steps())
        plan = RunPlan.compute(options.num_epochs, steps, options.max_steps)
        now = (data.partition_scheme.of, data.partition_scheme.how, str(self.accumulation_steps()))
        if saved is None or now == tuple(
            saved.invariants[name] for name in ("data", "batch_size", "accumulation_steps")
        ):
            return plan
        return self._replan_epoch(plan, data, saved.progress, options)

    def _replan_epoch(self, plan: RunPlan, data: BatchSource, now: Progress, options: RunOptions) -> RunPlan:
        """Count the steps behind, which took other batches than those ahead."""
        if plan.known_steps_per_epoch is None or options.num_epochs is None:
            return plan
        left = math.ceil((data.num_batches(now.offset) or 0) / self.accumulation_steps()) if now.batches else 0
        whole_epochs = options.num_epochs - now.epochs - (now.batches > 0)
        total = now.steps + left + whole_epochs * plan.known_steps_per_epoch
        return replace(plan, known_epochs=options.num_epochs, known_total_steps=min(total, options.max_steps or total))

    def _reported_names(self, set_names: Iterable[str]) -> frozenset[str]:
        """Return the names of all values that will be reported."""
        result = EvalResult(0.0, dict.fromkeys(self.eval_value_names(), 0.0))
        reported = self.train_value_names()
        evaluated = frozenset().union(*(result.values(name) for name in set_names))
        if twice := reported & evaluated:
            raise OptionError(
                f"{type(self).__name__}: two values would be reported as {min(twice)!r}, one of training and one of "
                "an evaluation. Give the metric, or the evaluation set, another name."
            )
        return reported | evaluated

    def _context(self, name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return the context manager hook `name`, or one that costs nothing where nobody overrides it."""
        context: Callable[[], contextlib.AbstractContextManager[None]] = getattr(self, name)
        return context if overrides(self, TrainerCore, name) else contextlib.nullcontext


@contextlib.contextmanager
def marking_forwards(run: Run) -> Iterator[None]:
    """Mark forward passes of training steps, in which wrapped models wait for each other."""
    if run.distributed.rendezvous is None:
        yield
        return
    counter = run.distributed.rendezvous.progress

    def mark(*_: object) -> None:
        if run.batch is not None:  # outside of steps, a process may call the model by itself
            counter.half_step()

    handle = run.model.register_forward_pre_hook(mark)
    try:
        yield
    finally:
        handle.remove()
