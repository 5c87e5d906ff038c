"""Evaluation and prediction: every sample once, in the dataset's order, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, final, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from ptacc.composition.roles import Role
from ptacc.composition.type_arguments import fill_type_defaults
from ptacc.core.batch_hooks import BatchHooks
from ptacc.core.checks import check_not_wrapped, check_scalars
from ptacc.data.batch import BatchSource, HostBatch
from ptacc.data.dataloader_config import DataLoaderConfig, check_dataset, limit_from_environment
from ptacc.data.division import find_division
from ptacc.data.sources import fingerprints, make_source
from ptacc.data.transfer import Transfer, make_transfer
from ptacc.data.wrappers import count_once_per_replica, fill_each, sync_sources
from ptacc.distributed.accelerator import forget_prepared, using_accelerator
from ptacc.distributed.failure import CoordinatedExit
from ptacc.errors import DataError, LossError, NestedRunError, OptionError
from ptacc.loop.error_notes import noting_batches
from ptacc.loop.streaming import stream_apart
from ptacc.model.gradients import preserved_gradients
from ptacc.model.joined_modules import join_modules
from ptacc.model.modes import get_modes, set_modes
from ptacc.model.option_modules import find_trained_options, options_moved
from ptacc.model.wrapping import ModelState, calling, prepare_model
from ptacc.rng import preserved_streams
from ptacc.run.eval_sums import LOSS, EvalSums
from ptacc.run.window import ItemCounter
from ptacc.tensors.samples import SampleSplitter, count_samples
from ptacc.tensors.structures import map_tensors, to_host
from ptacc.types.aliases import BatchT, OutputT, Pair, PairSample, RawT, SampleT, T
from ptacc.types.arguments import EvalOptions, check_flag
from ptacc.types.outputs import RESERVED_NAMES, EvalResult, StepOutput
from ptacc.types.protocols import SizedDataset, StreamLike, SupportsCheckpoint
from ptacc.validation import check_at_least, check_keywords

EVALUATION_SEED = 0
"""Seed of the random numbers drawn while evaluation data is loaded, the same in each evaluation."""

TrainData: TypeAlias = SizedDataset[RawT] | DataLoader[object]
EvalData: TypeAlias = SizedDataset[RawT] | Dataset[RawT] | StreamLike[RawT] | DataLoader[object]
EvalSets: TypeAlias = Mapping[str, EvalData[RawT]]
AnyEval: TypeAlias = EvalData[RawT] | EvalSets[RawT] | None


class EvaluationLoop(BatchHooks[BatchT, OutputT], Generic[BatchT, OutputT, SampleT]):
    """The part of the loop that changes no weights: evaluation and prediction."""

    _role: ClassVar[Role] = "core"

    if not TYPE_CHECKING:  # type checkers apply this rule by themselves

        def __class_getitem__(cls, arguments: Any) -> Any:
            """Fill in the defaults of type parameters, also those that refer to an earlier parameter."""
            return super().__class_getitem__(fill_type_defaults(cls, arguments))

    # ---- what to call

    @overload
    def evaluate(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> EvalResult: ...
    @overload
    def evaluate(self, dataset: EvalSets[SampleT], **options: Unpack[EvalOptions]) -> dict[str, EvalResult]: ...
    @overload
    def evaluate(
        self,
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[EvalOptions],
    ) -> EvalResult: ...
    @overload
    def evaluate(
        self,
        dataset: EvalSets[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT | None] | None,
        **options: Unpack[EvalOptions],
    ) -> dict[str, EvalResult]: ...
    @final
    def evaluate(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> EvalResult | dict[str, EvalResult]:
        """Evaluate on a dataset, counting every sample once.

        Args:
            dataset: A dataset or a DataLoader, or several of them by name.
            collate_fn: Makes a batch of a list of samples, or returns None to leave them out. Default: torch's
                `default_collate`.
            options: See `EvalOptions`.

        Returns:
            The result, the same on every process. For several datasets, a dict of results.

        Raises:
            DataError: The dataset is empty, or not a dataset, or the loss counts none of its items.
            OptionError: A count below 1, or dataset options given together with a DataLoader.
        """
        with self._distributed.synced("evaluate()") as must_match:
            check_not_wrapped(type(self).__name__, self.unwrapped_model)
            check_call("evaluate", dataset, collate_fn, options)
            limit = limit_from_environment(options.get("limit_batches"))
            sources = self._eval_sources(dataset, collate_fn, options, limit)
            must_match += fingerprints(sources)
        with self._prepared(sources.values()):
            results = {name: self._evaluate(name, source) for name, source in sources.items()}
        return results if isinstance(dataset, Mapping) else results[""]

    @overload
    def predict(
        self: EvaluationLoop[BatchT, list[T], SampleT], dataset: EvalData[SampleT], **options: Unpack[EvalOptions]
    ) -> list[T]: ...
    @overload
    def predict(
        self: EvaluationLoop[BatchT, list[T], SampleT],
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT] | None,
        **options: Unpack[EvalOptions],
    ) -> list[T]: ...
    @overload
    def predict(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> list[OutputT]: ...
    @overload
    def predict(
        self: EvaluationLoop[Pair, OutputT, PairSample], dataset: EvalData[Tensor], **options: Unpack[EvalOptions]
    ) -> list[OutputT]: ...
    @overload
    def predict(
        self: EvaluationLoop[Pair, OutputT, PairSample],
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], Tensor],
        **options: Unpack[EvalOptions],
    ) -> list[OutputT]: ...
    @overload
    def predict(
        self,
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT] | None,
        **options: Unpack[EvalOptions],
    ) -> list[OutputT]: ...
    @final
    def predict(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> list[Any]:
        """Compute the output for every sample of a dataset.

        Args:
            dataset: A dataset or a DataLoader.
            collate_fn: Makes a batch of a list of samples. Default: torch's `default_collate`.
            options: See `EvalOptions`.

        Returns:
            One output for each sample, in the dataset's order, on the CPU. The list is the same on every process.
            `torch.stack(predictions)` makes one tensor of outputs that are tensors.

        Raises:
            DataError: The dataset is empty, or `predict_step` does not return one output for each sample.
            OptionError: A count below 1, or dataset options given together with a DataLoader.
        """
        indexed = [pair for batch in self._predictions(dataset, collate_fn, options) for pair in batch]
        if sorted(index for index, _ in indexed) == list(range(len(indexed))):
            indexed.sort(key=lambda pair: pair[0])
        return [output for _, output in indexed]

    @overload
    def stream_predictions(
        self: EvaluationLoop[BatchT, list[T], SampleT], dataset: EvalData[SampleT], **options: Unpack[EvalOptions]
    ) -> Iterator[T]: ...
    @overload
    def stream_predictions(
        self: EvaluationLoop[BatchT, list[T], SampleT],
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT] | None,
        **options: Unpack[EvalOptions],
    ) -> Iterator[T]: ...
    @overload
    def stream_predictions(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> Iterator[OutputT]: ...
    @overload
    def stream_predictions(
        self: EvaluationLoop[Pair, OutputT, PairSample], dataset: EvalData[Tensor], **options: Unpack[EvalOptions]
    ) -> Iterator[OutputT]: ...
    @overload
    def stream_predictions(
        self: EvaluationLoop[Pair, OutputT, PairSample],
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], Tensor],
        **options: Unpack[EvalOptions],
    ) -> Iterator[OutputT]: ...
    @overload
    def stream_predictions(
        self,
        dataset: EvalData[RawT],
        *,
        collate_fn: Callable[[list[RawT]], BatchT] | None,
        **options: Unpack[EvalOptions],
    ) -> Iterator[OutputT]: ...
    @final
    def stream_predictions(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> Iterator[Any]:
        """Yield the outputs of `predict` one by one, for outputs that do not fit in memory together.

        Raises:
            NestedRunError: An iterator of an earlier call is still open.
        """
        if self._state.is_streaming:
            raise NestedRunError(
                f"{type(self).__name__}.stream_predictions() was called while it streams other predictions. Read those "
                "to their end, or close their iterator."
            )
        self._state.is_streaming = True
        try:
            for batch in stream_apart(self._predictions(dataset, collate_fn, options), self.device):
                for _, output in batch:
                    yield output
        finally:
            self._state.is_streaming = False

    # ---- evaluating

    def _evaluate(self, name: str, source: BatchSource) -> EvalResult:
        events = self._events()
        with (
            self._distributed.propagate_failure(f"evaluating {name}".rstrip()),
            self._eval_mode(),
            self.around_evaluation(),
        ):
            events.evaluation_start(name)
            sums, transfer = EvalSums(self.device), make_transfer(self.device)
            batches = count_once_per_replica(fill_each(source.epoch(0), self._distributed), self._distributed)
            total, counter = source.num_batches(), ItemCounter(self.count_items, self._items_are_samples)
            with noting_batches(self, f"the evaluation of {name!r}" if name else "an evaluation") as follow:
                number = 0
                for number, host in enumerate(follow(batches), start=1):
                    self._distributed.count_progress()
                    if number == 1:
                        self.check_batch(host.data)
                    output = self._evaluate_batch(host, transfer)
                    if not host.is_padding:
                        sums.add(output, counter.count(host))
                    events.eval_progress(number, total)
                    if self._is_interruptible() and self.run.stopping.poll_termination():
                        raise CoordinatedExit
                means = sums.means(self._distributed)
                check_has_items(name, number, means)
                result = self._make_result(name, means)
        with self._distributed.propagate_failure(f"after evaluating {name}".rstrip()):
            if self.is_running:
                self.run.is_consistent = False
            events.evaluation_end(name, result)
        return result

    def _evaluate_batch(self, host: HostBatch[BatchT], transfer: Transfer) -> StepOutput[OutputT]:
        self._state.eval_batch = host
        batch = transfer.to_device(host.data)
        with calling(self.unwrapped_model):
            output = self.eval_step(batch)
        check_scalars(type(self).__name__, "eval_step", output)
        if not host.is_padding:
            self.on_eval_batch_end(batch, output)
        return output

    def _make_result(self, name: str, means: dict[str, float]) -> EvalResult:
        loss, metrics = means.pop(LOSS), self.compute_metrics()
        if taken := means.keys() & (metrics.keys() | RESERVED_NAMES):
            raise LossError(
                f"{type(self).__name__}.eval_step: logged[{min(taken)!r}]: an evaluation reports another value of this "
                "name. Log it under a name of its own."
            )
        return EvalResult(loss, means | metrics)

    def _is_interruptible(self) -> bool:
        """Return whether a termination signal may end the run within this evaluation.

        An evaluation that a hook calls is completed if the run can be saved after it.
        """
        return self.is_running and (self.run.is_scheduled_evaluation or not isinstance(self, SupportsCheckpoint))

    # ---- predicting

    def _predictions(
        self, dataset: Any, collate_fn: Any, options: EvalOptions
    ) -> Generator[list[tuple[int, OutputT]], None, None]:
        """Iterate over the batches of all processes, as (index in the dataset, output), in the order of loading."""
        with self._distributed.synced("predict()") as must_match:
            check_not_wrapped(type(self).__name__, self.unwrapped_model)
            if isinstance(dataset, Mapping):
                raise DataError("predict() takes one dataset: got a mapping. Call it for each dataset.")
            check_call("predict", dataset, collate_fn, options)
            # Not limited by the environment variable: scripts match predictions with their data.
            sources = self._eval_sources(dataset, collate_fn, options, options.get("limit_batches"))
            must_match += fingerprints(sources)
        (source,) = sources.values()
        events = self._events()
        position, transfer = 0, make_transfer(self.device)
        splitter = SampleSplitter(f"{type(self).__name__}.predict_step")
        failures = self._distributed.propagate_failure("in a prediction")
        with self._prepared([source]), failures, self._eval_mode(), self.around_prediction():
            events.prediction_start()
            batches, total = count_once_per_replica(source.epoch(0), self._distributed), source.num_batches()
            with noting_batches(self, "a prediction") as follow:
                for number, host in enumerate(follow(batches), start=1):
                    check_not_skipped(host)
                    local = self._predict_batch(host, transfer)
                    events.eval_progress(number, total)
                    # Gathered as batches: pickling a sample, which is a view, would send its whole batch each time.
                    for indices, outputs in filter(None, self.distributed.gather(None if host.is_padding else local)):
                        split = enumerate(splitter.split(outputs, len(indices)), start=position)
                        yield [(p if index < 0 else index, o) for index, (p, o) in zip(indices, split, strict=True)]
                        position += len(indices)
            events.prediction_end()

    def _predict_batch(self, host: HostBatch[BatchT], transfer: Transfer) -> tuple[Sequence[int], OutputT]:
        """Return the indices of a batch's samples, -1 if unknown, and their outputs on the CPU."""
        self._state.eval_batch = host
        with calling(self.unwrapped_model):
            outputs = map_tensors(to_host, self.predict_step(transfer.to_device(host.data)))
        if host.indices is not None:
            return host.indices, outputs
        count = host.samples if host.samples is not None and host.total is not None else None
        return [-1] * (count_samples(outputs, host.data) if count is None else count), outputs

    # ---- data and model

    def _eval_sources(
        self, dataset: Any, collate_fn: Any, options: EvalOptions, limit: int | None
    ) -> dict[str, BatchSource]:
        """Return the source of each evaluation set by name, that of a single set under an empty name."""
        sets = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
        if not sets:
            raise DataError("No evaluation data was given: the mapping is empty. Leave it out to evaluate nothing.")
        return {
            name: make_source(
                self._eval_loader(data, collate_fn, options),
                self._distributed,
                EVALUATION_SEED,
                data_is_sharded=options.get("data_is_sharded", False),
                limit=limit,
                is_training=False,
                seed_every_batch=options.get("seed_every_batch", False),
            )
            for name, data in sets.items()
        }

    def _eval_loader(self, data: Any, collate_fn: Any, options: EvalOptions) -> DataLoader[object]:
        check_dataset(data)
        if not isinstance(data, DataLoader):
            kwargs = options.get("dataloader_kwargs", {})
            request = DataLoaderConfig(data, options.get("per_device_batch_size"), collate_fn, kwargs, self.device)
            return self.make_eval_dataloader(request)
        division = None if self._distributed.is_single_process else find_division(data)
        if division is not None and division.owner is not data.dataset:
            raise DataError(
                f"The evaluation data comes with a {type(division.owner).__name__}, whose padding would count samples "
                "twice. Leave the sampler out: the samples are split over the processes."
            )
        return data

    @contextlib.contextmanager
    def _prepared(self, sources: Iterable[BatchSource]) -> Generator[None]:
        """Equalize the numbers of batches, and move the model to the device, unless that has been done around it."""
        with self._distributed.propagate_failure("setting an evaluation up"):
            sync_sources(sources)
        if self._state.unwrapped_model is not None:  # within a run, or within another evaluation or prediction
            yield
            return
        with self._wrapped_model():
            self._set_model(prepare_model(self.accelerator, self.unwrapped_model))
            yield

    @contextlib.contextmanager
    def _wrapped_model(self) -> Generator[ModelState]:
        """Restore the user's model after a block that may wrap and patch it. Yield its state before.

        Modules among the options are on the device within the block.
        """
        accelerator = self.accelerator  # raises for an unsupported launch, before the model is touched
        unwrapped = self.model
        saved = ModelState.capture(unwrapped)
        self._state.outside = find_trained_options(self, self.optimizer)
        outside_modes = [get_modes(module) for module in self._state.outside.values()]
        self._state.unwrapped_model = unwrapped
        try:
            with using_accelerator(self), options_moved(self, unwrapped, self.device):
                yield saved
        finally:
            self._set_model(unwrapped)
            self._state.unwrapped_model = None
            saved.restore(unwrapped)
            for modes in outside_modes:
                set_modes(modes)
            forget_prepared(accelerator)

    @contextlib.contextmanager
    def _eval_mode(self) -> Generator[None]:
        """Put the model, and what is trained with it, into eval mode, without gradients, for the block.

        Modes, gradients and random streams are restored after it. The modes come first: a module whose `train(mode)`
        changes its weights has to change back the weights that the evaluation used.
        """
        model = join_modules(self.model, self.trained_outside)
        modes, streams = get_modes(model), preserved_streams(self.device)
        with torch.no_grad(), streams, preserved_gradients(model), self.around_evaluation_weights():
            try:
                model.eval()
                yield
            finally:
                self._state.eval_batch = None
                set_modes(modes)


def check_call(call: str, data: Any, collate_fn: Any, options: EvalOptions) -> None:
    """Raise for invalid options, and for dataset options given together with a DataLoader."""
    check_keywords(f"{call}()", options, EvalOptions.__annotations__)
    for flag in ("data_is_sharded", "seed_every_batch"):
        check_flag(call, flag, options.get(flag, False))
    for name in ("per_device_batch_size", "limit_batches"):
        if options.get(name) is not None:
            check_at_least(call, name, options.get(name), 1)
    sets = data.values() if isinstance(data, Mapping) else [data]
    has_dataset_options = collate_fn or options.keys() & {"per_device_batch_size", "dataloader_kwargs"}
    if has_dataset_options and any(isinstance(part, DataLoader) for part in sets):
        raise OptionError(
            f"{call}() got a DataLoader together with per_device_batch_size, dataloader_kwargs or collate_fn: the "
            "loader has its own. Give the dataset instead, or leave them out."
        )


def check_has_items(name: str, batches: int, means: Mapping[str, float]) -> None:
    """Raise `DataError` for an evaluation without a loss, of so many batches."""
    if LOSS in means:
        return
    data = f"The evaluation data {name!r}" if name else "The evaluation data"
    if not batches:
        raise DataError(f"{data} gave no batch: it is empty, or drop_last dropped the only one.")
    raise DataError(
        f"{data} has no items at all: count_items gave 0 for each of its batches, on every process, as where the loss "
        "ignores all targets. Compare the targets with the ignored one, by default -100, or leave the data out."
    )


def check_not_skipped(host: HostBatch[Any]) -> None:
    """Raise `DataError` if a collate function left a batch of a prediction out."""
    if host.data is None:
        raise DataError(
            "The collate function returned None, which leaves a batch out: a prediction needs one output for each "
            "sample. Leave the samples out of the dataset."
        )
