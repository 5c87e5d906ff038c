"""From the arguments of `train()` to the state of a run. All arguments are checked before any weight is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic

from torch.utils.data import DataLoader

from ptacc.composition.roles import Role
from ptacc.core.batch_hooks import BatchHooks
from ptacc.core.callback import overrides
from ptacc.core.checks import check_monitor, check_trainable, raise_unreported
from ptacc.core.module_options import module_options
from ptacc.data.batch import BatchSource
from ptacc.data.dataloader_config import DataLoaderConfig, check_dataset, limit_from_environment
from ptacc.data.sources import fingerprints, make_source
from ptacc.data.wrappers import sync_sources
from ptacc.errors import DataError, OptionError
from ptacc.loop.description import describe_run
from ptacc.loop.evaluation import EvaluationLoop
from ptacc.model.optimizer_modes import OptimizerModes
from ptacc.run.history import RunHistory
from ptacc.run.history_file import HistoryFile
from ptacc.run.run import Run
from ptacc.run.state import ResumeState
from ptacc.run.stopping import StopState
from ptacc.types.accumulation import AccumulationSchedule
from ptacc.types.aliases import BatchT, OutputT, SampleT
from ptacc.types.arguments import EvalOptions, RunOptions, ends_within_epoch, options_fingerprint
from ptacc.types.monitor import ValueNames
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.progress import Progress, RunPlan


class RunSetup(EvaluationLoop[BatchT, OutputT, SampleT], Generic[BatchT, OutputT, SampleT]):
    """The part of the loop that makes the state of a run from the arguments of `train()`."""

    _role: ClassVar[Role] = "core"

    def _make_run(self, train_data: Any, eval_data: Any, options: RunOptions) -> Run:
        """Check everything that a run depends on, and make its state."""
        distributed = self._distributed
        self._state.num_runs += 1
        with distributed.propagate_failure("drawing a seed"):
            saved = self.find_resume_state()
            seed = distributed.broadcast(self.make_seed()) if saved is None else saved.seed
        history_file = self._history_file_of_run() if distributed.rank == 0 else None
        with distributed.synced("the set-up of train()") as must_match:
            if history_file is not None and (saved is None or saved.shared["history"]["file"] is None):
                history_file.check_unused()
            slots, modules, by_closure = self.optimizer_slots(), module_options(self), self.steps_by_closure
            check_trainable(type(self).__name__, self.unwrapped_model, slots, modules, by_closure=by_closure)
            limit, accumulation = limit_from_environment(options.get("limit_batches")), self._accumulation()
            data = self._train_source(train_data, options, seed, limit)
            eval_sets = self._run_eval_sources(eval_data, options, limit)
            values = self._reported_names(eval_sets)
            for owner, monitor in self.monitors():
                check_monitor(monitor, values, owner)
            must_match += [
                *fingerprints({"train": data}),
                *fingerprints(eval_sets),
                options_fingerprint(options),
                f"accumulation_steps={accumulation}",
            ]
        with distributed.propagate_failure("setting a run up"):
            sync_sources([data, *eval_sets.values()])
            scheme, history = data.partition_scheme, RunHistory(history_file)
            if history_file is not None:
                history.description = describe_run(self, options)
            engine = self.make_engine()
            return Run(
                options=options,
                plan=self._plan(data, options, accumulation, saved),
                seed=seed,
                engine=engine,
                optimizer_modes=OptimizerModes(self.trained_modules, (slot.optimizer for slot in engine.slots)),
                device=self.device,
                distributed=distributed,
                data=data,
                eval_data=eval_sets,
                history=history,
                stopping=StopState(distributed, history, options),
                accumulation=accumulation,
                retains_outputs=distributed.is_replica_leader and overrides(self, BatchHooks, "on_batch_end"),
                value_names=values,
                invariants={**self.resume_invariants(), **scheme.invariants()},
                resume_state=saved,
            )

    def _history_file_of_run(self) -> HistoryFile | None:
        """Return the file of the run: that of the option, and for later runs of the trainer one with their number."""
        if self.history_file is None:
            return None
        path, number = Path(self.history_file), self._state.num_runs
        return self._make_history_file(path if number == 1 else path.with_stem(f"{path.stem}-run-{number}"))

    def _train_source(self, data: Any, options: RunOptions, seed: int, limit: int | None) -> BatchSource:
        return make_source(
            self._train_loader(data, options),
            self._distributed,
            seed,
            data_is_sharded=options.get("data_is_sharded", False),
            limit=limit,
            seed_every_batch=options.get("seed_every_batch", False),
        )

    def _train_loader(self, data: Any, options: RunOptions) -> DataLoader[object]:
        check_dataset(data)
        batch_size, collate_fn = options.get("per_device_batch_size"), options["collate_fn"]
        kwargs = options.get("train_dataloader_kwargs", {})
        if not isinstance(data, DataLoader):
            return self.make_train_dataloader(DataLoaderConfig(data, batch_size, collate_fn, kwargs, self.device))
        if batch_size is not None or kwargs or collate_fn:
            raise OptionError(
                "train() got a DataLoader together with per_device_batch_size, train_dataloader_kwargs or collate_fn: "
                "the loader has its own. Give the dataset instead, or leave them out."
            )
        return data

    def _run_eval_sources(self, data: Any, options: RunOptions, limit: int | None) -> dict[str, BatchSource]:
        if data is None:
            return {}
        eval_options = EvalOptions(
            per_device_batch_size=options.get("per_device_batch_size"),
            dataloader_kwargs=options.get("eval_dataloader_kwargs", {}),
            seed_every_batch=options.get("seed_every_batch", False),
        )
        return self._eval_sources(data, options["collate_fn"], eval_options, limit)

    def _reported_names(self, set_names: Iterable[str]) -> ValueNames:
        """Return the names of the values that the run may report."""
        result = EvalResult(0.0, dict.fromkeys(self.eval_value_names(), 0.0))
        train_names = self.train_value_names()
        eval_names = frozenset().union(*(result.values(name) for name in set_names))
        if duplicates := train_names & eval_names:
            raise OptionError(
                f"{type(self).__name__}: two values would be reported as {min(duplicates)!r}, one of training and one "
                "of an evaluation. Give the metric, or the evaluation set, another name."
            )
        return ValueNames(train_names | eval_names, frozenset(set_names), allow_logged=has_own_steps(type(self)))

    def _check_evaluated_monitors(self, run: Run) -> None:
        """Raise `MonitorError` if the first evaluation of all sets has not reported a value that is monitored."""
        reported = self.train_value_names().union(*(r.values(name) for name, r in run.epoch.evaluations.items()))
        for owner, monitor in () if run.has_checked_monitors else self.monitors():
            if monitor.name not in reported and not monitor.name.startswith("train/"):
                run.is_consistent = False  # the epoch may lack its record
                raise_unreported(monitor, reported, owner)
        run.has_checked_monitors = True

    def _check_train_monitors(self, record: EpochRecord) -> None:
        """Raise `MonitorError` if the first epoch has not reported a value of training that is monitored."""
        for owner, monitor in self.monitors() if record.epoch == 1 and record.is_complete else ():
            if monitor.name not in record.values() and monitor.name.startswith("train/"):
                raise_unreported(monitor, record.values().keys(), owner)

    # ---- the length of the run

    def _plan(
        self, data: BatchSource, options: RunOptions, accumulation: AccumulationSchedule, saved: ResumeState | None
    ) -> RunPlan:
        """Compute the length of the run in steps."""
        num_batches = data.num_batches()
        if num_batches == 0:
            raise DataError(
                "The training data gives no batch: it is empty, or drop_last dropped the only one. Give smaller "
                "batches, or keep it."
            )
        if num_batches is None and not ends_within_epoch(options):
            raise OptionError(
                f"train(num_epochs={options['num_epochs']}) on data without a length: the number of steps is unknown. "
                "Give max_steps, max_items or max_time, or give the dataset a __len__."
            )
        plan = RunPlan.compute(options["num_epochs"], None, options["max_steps"], options["max_items"])
        if num_batches is None:
            return plan
        planned = accumulation.revise(plan, Progress(), num_batches, num_batches)
        if saved is None:
            return planned
        scheme, before = data.partition_scheme, saved.invariants
        was_split_alike = (scheme.data, scheme.batching) == (before["data"], before["batch_size"])
        if was_split_alike and before["accumulation_steps"] == str(accumulation):
            return planned
        # The steps so far had another number of samples.
        progress = saved.progress
        batches_left = data.num_batches(progress.offset) if progress.batches else num_batches
        return planned if batches_left is None else accumulation.revise(plan, progress, batches_left, num_batches)


def has_own_steps(trainer: type) -> bool:
    """Return whether a class has steps that are not of this library, so that they may log values."""
    own = [cls for cls in trainer.__mro__ if cls.__module__.partition(".")[0] != "ptacc"]
    return any(step in vars(cls) for cls in own for step in ("train_step", "eval_step"))


@contextlib.contextmanager
def forwards_counted(run: Run) -> Generator[None]:
    """Count the forward passes of training steps as progress of this rank: wrapped models synchronize in them."""
    if run.distributed.rendezvous is None:
        yield
        return
    counter = run.distributed.rendezvous.progress

    def count(*_: object) -> None:
        if run.batch is not None:  # outside of steps, a rank may call the model alone
            counter.half_step()

    handle = run.model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
