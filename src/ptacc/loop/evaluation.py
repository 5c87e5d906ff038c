"""Evaluation and prediction: every sample once, in the dataset's order, on any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, final, overload

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import Unpack

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.composition.type_arguments import with_defaults
from ptacc.core.batch_hooks import BatchHooks
from ptacc.core.checks import check_bare, check_eval_output
from ptacc.data.batch import BatchSource, HostBatch
from ptacc.data.dataloader_config import DataLoaderConfig, check_dataset, limit_from_environment
from ptacc.data.sources import fingerprints, make_source
from ptacc.data.transfer import Transfer, transfer_to
from ptacc.data.wrappers import counted_once, level
from ptacc.distributed.accelerator import forget_prepared
from ptacc.distributed.failure import CoordinatedExit
from ptacc.errors import DataError, OptionError
from ptacc.model.wrapping import ModelState
from ptacc.rng import preserved_streams
from ptacc.run.state import LossSum
from ptacc.tensors.structures import leading_dimension, map_tensors, to_host, unbind
from ptacc.types.aliases import BatchT, OutputT, Pair, PairSample, RawT, SampleT
from ptacc.types.arguments import EvalOptions, check_data_is_sharded
from ptacc.types.outputs import EvalResult, Predictions, StepOutput
from ptacc.types.protocols import SizedDataset, SupportsCheckpoint
from ptacc.validation import check_at_least, check_keywords

EVALUATION_SEED = 0
"""Loading evaluation data that draws at random gives the same each time."""

EvalData: TypeAlias = SizedDataset[RawT] | Dataset[RawT] | DataLoader[object]
EvalSets: TypeAlias = Mapping[str, EvalData[RawT]]


class EvaluationLoop(BatchHooks[BatchT, OutputT], Generic[BatchT, OutputT, SampleT]):
    """Evaluating and predicting: the part of the loop that changes no weight."""

    _role: ClassVar[Role] = "core"

    if not TYPE_CHECKING:  # checkers know the rule that this carries out

        def __class_getitem__(cls, arguments: Any) -> Any:
            """Let a type parameter that is left out be its default, also where that names an earlier parameter."""
            return super().__class_getitem__(with_defaults(cls, arguments))

    # ---- what to override

    @hook("factory")
    def make_eval_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        """Make the loader of an evaluation or a prediction."""
        return request.build(shuffle=False)

    # ---- what to call

    @overload
    def evaluate(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> EvalResult: ...
    @overload
    def evaluate(self, dataset: EvalSets[SampleT], **options: Unpack[EvalOptions]) -> dict[str, EvalResult]: ...
    @overload
    def evaluate(
        self, dataset: EvalData[RawT], *, collate_fn: Callable[[list[RawT]], BatchT], **options: Unpack[EvalOptions]
    ) -> EvalResult: ...
    @overload
    def evaluate(
        self, dataset: EvalSets[RawT], *, collate_fn: Callable[[list[RawT]], BatchT], **options: Unpack[EvalOptions]
    ) -> dict[str, EvalResult]: ...
    @final
    def evaluate(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> EvalResult | dict[str, EvalResult]:
        """Evaluate on a dataset, every sample once.

        Args:
            dataset: A dataset or a DataLoader, or several of them by name.
            collate_fn: Makes a batch of a list of samples; torch's own if not given.
            options: See `EvalOptions`.

        Returns:
            The result, the same on every process; for several sets, a mapping of them.

        Raises:
            DataError: No data, an empty dataset, or one that is not what it says.
            OptionError: A count below 1.
        """
        with self._distributed.synced("evaluate()") as told:
            check_bare(type(self).__name__, self.unwrapped_model)
            check_call("evaluate", dataset, collate_fn, options)
            limit = limit_from_environment(options.get("limit_batches"))
            sources = self._eval_sources(dataset, collate_fn, options, limit)
            told += fingerprints(sources)
        with self._prepared(sources.values()):
            results = {name: self._evaluate(name, source) for name, source in sources.items()}
        return results if isinstance(dataset, Mapping) else results[""]

    @overload
    def predict(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> Predictions[OutputT]: ...
    @overload
    def predict(
        self: EvaluationLoop[Pair, OutputT, PairSample],
        dataset: EvalData[torch.Tensor],
        **options: Unpack[EvalOptions],
    ) -> Predictions[OutputT]: ...
    @overload
    def predict(
        self, dataset: EvalData[RawT], *, collate_fn: Callable[[list[RawT]], BatchT], **options: Unpack[EvalOptions]
    ) -> Predictions[OutputT]: ...
    @final
    def predict(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> Predictions[OutputT]:
        """Predict for a dataset: one output for each sample, in the dataset's order, on the host.

        Args:
            dataset: A dataset or a DataLoader.
            collate_fn: Makes a batch of a list of samples; torch's own if not given.
            options: See `EvalOptions`.

        Returns:
            The outputs, the same on every process.

        Raises:
            DataError: No data, an empty dataset, or `predict_step` does not give one output for each sample.
        """
        indexed = list(self._predictions(dataset, collate_fn, options))
        if sorted(index for index, _ in indexed) == list(range(len(indexed))):
            indexed.sort(key=lambda pair: pair[0])
        return Predictions([output for _, output in indexed])

    @overload
    def stream_predictions(self, dataset: EvalData[SampleT], **options: Unpack[EvalOptions]) -> Iterator[OutputT]: ...
    @overload
    def stream_predictions(
        self: EvaluationLoop[Pair, OutputT, PairSample],
        dataset: EvalData[torch.Tensor],
        **options: Unpack[EvalOptions],
    ) -> Iterator[OutputT]: ...
    @overload
    def stream_predictions(
        self, dataset: EvalData[RawT], *, collate_fn: Callable[[list[RawT]], BatchT], **options: Unpack[EvalOptions]
    ) -> Iterator[OutputT]: ...
    @final
    def stream_predictions(
        self, dataset: Any, *, collate_fn: Callable[[list[Any]], Any] | None = None, **options: Unpack[EvalOptions]
    ) -> Iterator[OutputT]:
        """Predict as `predict` does, one sample at a time, for data whose outputs do not fit in memory."""
        for _, output in self._predictions(dataset, collate_fn, options):
            yield output

    # ---- how it is done

    def _evaluate(self, name: str, source: BatchSource) -> EvalResult:
        events = self._events()
        with (
            self._distributed.propagate_failure(f"evaluating {name}".rstrip()),
            self._evaluating(),
            self.around_evaluation(),
        ):
            events.evaluation_start(name)
            losses, transfer = LossSum(self.device), transfer_to(self.device)
            for batches, host in enumerate(counted_once(source.epoch(0), self._distributed), start=1):
                self._distributed.count_progress()
                if batches == 1:
                    self.check_batch(host.data)
                output = self._evaluate_batch(host, transfer)
                if not host.is_padding:
                    _add(losses, output, self.count_items(host.data))
                if self._may_break_off() and self.run.agree_to_terminate():
                    raise CoordinatedExit
            total, items = self.distributed.sum([float(losses.total), losses.items])
            if not items:
                raise DataError(
                    f"The evaluation data {name!r} gave no batch: it is empty, or drop_last dropped the only one."
                )
            result = EvalResult(total / items, self.compute_metrics())
        with self._distributed.propagate_failure(f"after evaluating {name}".rstrip()):
            if self.is_running:
                self.run.is_consistent = False
            events.evaluation_end(name, result)
        return result

    def _may_break_off(self) -> bool:
        """Say whether the run may end within this evaluation: not within a hook's, where it is to be saved after."""
        return self.is_running and (self.run.is_scheduled_evaluation or not isinstance(self, SupportsCheckpoint))

    def _evaluate_batch(self, host: HostBatch[BatchT], transfer: Transfer) -> StepOutput[OutputT]:
        batch = transfer.bring(host.data)
        output = self.eval_step(batch)
        check_eval_output(type(self).__name__, output)
        if not host.is_padding:
            self.on_eval_batch_end(batch, output)
        return output

    def _predictions(self, dataset: Any, collate_fn: Any, options: EvalOptions) -> Iterator[tuple[int, OutputT]]:
        """Iterate over (index in the dataset, output): in loading order, the same on every process."""
        with self._distributed.synced("predict()") as told:
            check_bare(type(self).__name__, self.unwrapped_model)
            if isinstance(dataset, Mapping):
                raise DataError("predict() takes one dataset: got a mapping. Call it for each set.")
            check_call("predict", dataset, collate_fn, options)
            # A smoke run by the environment variable leaves predictions whole: scripts line them up with their data.
            sources = self._eval_sources(dataset, collate_fn, options, options.get("limit_batches"))
            told += fingerprints(sources)
        (source,) = sources.values()
        events = self._events()
        position, transfer = 0, transfer_to(self.device)
        together = self._distributed.propagate_failure("in a prediction")
        with self._prepared([source]), together, self._evaluating(), self.around_prediction():
            events.prediction_start()
            for host in counted_once(source.epoch(0), self._distributed):
                outputs = self._predict_batch(host, transfer)
                # Batch by batch, and not sample by sample: a view of a batch is sent with the whole of it.
                for indices, batch in filter(None, self.distributed.gather(None if host.is_padding else outputs)):
                    for index, output in zip(indices, unbind(batch, len(indices)), strict=True):
                        yield (position if index < 0 else index), output
                        position += 1
            events.prediction_end()

    def _predict_batch(self, host: HostBatch[BatchT], transfer: Transfer) -> tuple[Sequence[int], OutputT]:
        """Return the indices of a batch's samples, -1 for those that have none, and their outputs on the host."""
        outputs = map_tensors(to_host, self.predict_step(transfer.bring(host.data)))
        count = leading_dimension(outputs)
        if host.indices is None:
            return [-1] * count, outputs
        if count != len(host.indices):
            raise DataError(
                f"{type(self).__name__}.predict_step gave {count} outputs for {len(host.indices)} samples. "
                "Return one for each sample, along the first dimension."
            )
        return host.indices, outputs

    def _eval_sources(
        self, dataset: Any, collate_fn: Any, options: EvalOptions, limit: int | None
    ) -> dict[str, BatchSource]:
        """Return the batches of each evaluation set by name, those of a single set under an empty name."""
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
            )
            for name, data in sets.items()
        }

    def _eval_loader(self, data: Any, collate_fn: Any, options: EvalOptions) -> DataLoader[object]:
        check_dataset(data)
        if isinstance(data, DataLoader):
            if (
                isinstance(getattr(data.batch_sampler, "sampler", None), DistributedSampler)
                and not self._distributed.is_single_process
            ):
                raise DataError(
                    "The evaluation data comes with a DistributedSampler, whose padding would count samples twice. "
                    "Leave the sampler out: samples are dealt to the processes."
                )
            return data
        kwargs = options.get("dataloader_kwargs", {})
        request = DataLoaderConfig(data, options.get("per_device_batch_size"), collate_fn, kwargs, self.device)
        return self.make_eval_dataloader(request)

    @contextlib.contextmanager
    def _prepared(self, sources: Iterable[BatchSource]) -> Iterator[None]:
        """Have the data levelled and the model on the device; a run has it there already."""
        with self._distributed.propagate_failure("setting an evaluation up"):
            level(sources)
        if self.is_running:
            yield
            return
        with self._wrapped_model():
            self._set_model(self.accelerator.prepare_model(self.unwrapped_model, evaluation_mode=True))
            yield

    @contextlib.contextmanager
    def _wrapped_model(self) -> Iterator[None]:
        """Let the block wrap and patch the user's model, and give it back as it was."""
        accelerator = self.accelerator  # first: where the launch is refused, nothing was borrowed
        bare = self.model
        remembered = ModelState.capture(bare)
        self._state.bare_model = bare
        try:
            yield
        finally:
            self._set_model(bare)
            self._state.bare_model = None
            remembered.restore(bare)
            forget_prepared(accelerator)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Be in eval mode without gradients, and leave flags and random streams as they were."""
        remembered = ModelState.capture(self.model)
        streams = preserved_streams(devices=self.device.type != "cpu")
        try:
            with torch.no_grad(), streams, self.around_evaluation_weights():
                self.model.eval()
                yield
        finally:
            remembered.restore_flags()


def check_call(call: str, data: Any, collate_fn: Any, options: EvalOptions) -> None:
    """Raise for options there are not, and for a ready DataLoader beside what only a dataset needs to be told."""
    check_keywords(f"{call}()", options, EvalOptions.__annotations__)
    check_data_is_sharded(call, options.get("data_is_sharded", False))
    for name in ("per_device_batch_size", "limit_batches"):
        if options.get(name) is not None:
            check_at_least(call, name, options.get(name), 1)
    sets = data.values() if isinstance(data, Mapping) else [data]
    of_dataset = collate_fn or options.keys() & {"per_device_batch_size", "dataloader_kwargs"}
    if of_dataset and any(isinstance(part, DataLoader) for part in sets):
        raise OptionError(
            f"{call}() got a ready DataLoader, and per_device_batch_size, dataloader_kwargs or collate_fn beside it: "
            "the loader has its own. Give the dataset instead, or leave them out."
        )


def _add(losses: LossSum, output: StepOutput[Any], count: int) -> None:
    if output.is_sum:
        losses.total.add_(output.loss)
        losses.items += count
    elif count:
        losses.add(output.loss, count)
