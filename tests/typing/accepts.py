"""Code that must stay valid: mypy and pyright accept every line, without ignored errors.

A test also runs this file, so that the guards check its classes. It creates trainers and does not train them.
"""

# Users write new defaults without annotation: their `--strict` does not include this check.
# mypy: disable-error-code="mutable-override"

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypedDict, assert_type, overload

import numpy as np
import pandas as pd
import torch
from datasets import Dataset as HFDataset
from datasets import DatasetDict
from datasets import IterableDataset as HFIterableDataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    BatchEncoding,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)
from typing_extensions import TypeVar, override

from ptacc import (
    AcceleratorBuilder,
    AMPMixin,
    BatchMixin,
    Best,
    Cadence,
    Callback,
    CheckpointMixin,
    ClosureMixin,
    DataLoaderConfig,
    EpochRecord,
    Epochs,
    EvalResult,
    FreezeMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    Minutes,
    Mixin,
    MixUpMixin,
    Monitor,
    MultiUpdateLoop,
    OptimizerDict,
    Pair,
    PrintMetrics,
    Progress,
    ProgressBar,
    RestoreBestWeights,
    Run,
    RunHistory,
    RunPlan,
    SaveBest,
    SeedMixin,
    StateKey,
    StepOutput,
    StepRecord,
    StepResult,
    Steps,
    StopOnNonFinite,
    Trainer,
    TrainerCore,
    TrainingLoop,
    Update,
    decay_groups,
    default_callbacks,
    gradual_unfreezing,
    hook,
    replaces_super,
)
from ptacc.protocols import (
    AcceleratorProtocol,
    DataLoaderKwargs,
    EvalOptions,
    HasModel,
    LRSchedulerLike,
    MetricLike,
    SchedulerFactory,
    SchedulerLike,
    SizedDataset,
    Stateful,
    SupportsCheckpoint,
    SupportsGradAccum,
    SupportsGradClip,
    SupportsLRScheduler,
    SupportsMetrics,
    SupportsMixedPrecision,
    SupportsSeed,
    TrainOptions,
)
from ptacc.testing import assert_overfits_one_batch, assert_split_invariant
from ptacc.trainers import (
    CausalLMTrainer,
    ClassificationTrainer,
    ContrastiveTrainer,
    DistillationTrainer,
    GANTrainer,
    RegressionTrainer,
    SavePretrained,
    SegmentationTrainer,
    Seq2SeqTrainer,
    SequenceClassificationTrainer,
    TokenClassificationTrainer,
)
from ptacc.tuning import find_batch_size, find_learning_rate

BatchT = TypeVar("BatchT")
OutputT = TypeVar("OutputT")

net = nn.Linear(4, 3)
loss = nn.CrossEntropyLoss()
opt = torch.optim.SGD(net.parameters(), lr=0.1)


# ==== datasets and loaders


class Digits(Dataset[Pair]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> Pair:
        raise NotImplementedError


class Labelled(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError


class Priced(Dataset[tuple[Tensor, float]]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        raise NotImplementedError


class Unlabelled(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> Tensor:
        raise NotImplementedError


class Plain:
    """A dataset that has no base class."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int, /) -> Pair:
        raise NotImplementedError


class Stream(IterableDataset[Pair]):
    @override
    def __iter__(self) -> Iterator[Pair]:
        raise NotImplementedError


class LabelledStream(IterableDataset[tuple[Tensor, int]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        raise NotImplementedError


class Sentences(Dataset[str]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> str:
        raise NotImplementedError


class SentenceStream(IterableDataset[str]):
    @override
    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


class Arrays(Dataset[tuple[np.ndarray[Any, np.dtype[np.float32]], float]]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], float]:
        raise NotImplementedError


class Scalars(Dataset[tuple[Tensor, np.int64]]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, np.int64]:
        raise NotImplementedError


class ForeignStream:
    """A stream of another library: to type checkers, `datasets.IterableDataset` is not one of torch's."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}


data = Digits()
tensors = TensorDataset(torch.zeros(8, 4), torch.zeros(8))
pairs: list[Pair] = []
loader: DataLoader[Pair] = DataLoader(data, batch_size=4)


def to_pair(samples: list[Pair]) -> Pair:
    raise NotImplementedError


def tokenise(sentences: list[str]) -> Pair:
    raise NotImplementedError


def tokenise_any(sentences: Sequence[object]) -> Pair:
    raise NotImplementedError


def data_for_the_supervised_trainer(trainer: Trainer) -> None:
    trainer.train(data, num_epochs=1)
    trainer.train(data, data, num_epochs=1)
    trainer.train(train_dataset=data, eval_dataset=data, num_epochs=1)
    trainer.train(Labelled(), Labelled(), num_epochs=1)
    trainer.train(Priced(), Priced(), num_epochs=1)
    trainer.train(Plain(), Plain(), num_epochs=1)
    trainer.train(tensors, tensors, num_epochs=1)
    trainer.train(pairs, pairs, num_epochs=1)
    trainer.train([(torch.zeros(4), torch.zeros(1))], num_epochs=1)
    trainer.train([(torch.zeros(4), 1), (torch.zeros(4), 0)], num_epochs=1)
    trainer.train(Subset(data, [0, 1]), Subset(Labelled(), [0, 1]), num_epochs=1)
    train, validation = random_split(data, [6, 2])
    trainer.train(train, validation, num_epochs=1)
    trainer.train(*random_split(Labelled(), [6, 2]), num_epochs=1)
    trainer.train(loader, loader, num_epochs=1)
    trainer.train(DataLoader(tensors), DataLoader(tensors), num_epochs=1)
    trainer.train(data, loader, num_epochs=1)
    trainer.train(Stream(), Stream(), max_steps=9)
    trainer.train(LabelledStream(), LabelledStream(), max_steps=9)
    trainer.train(data, Stream(), num_epochs=1)
    trainer.train(Arrays(), Arrays(), num_epochs=1)
    trainer.train(Scalars(), {"near": Scalars()}, num_epochs=1)
    trainer.train([(np.zeros(4), np.zeros(1)), (np.zeros(4), np.ones(1))], num_epochs=1)
    trainer.train(ForeignStream(), ForeignStream(), max_steps=9)
    assert_type(trainer.evaluate(ForeignStream()), EvalResult)
    assert_type(trainer.evaluate(Arrays()), EvalResult)


def data_of_datasets(rows: HFDataset, sets: DatasetDict, stream: HFIterableDataset) -> None:
    loop = DictLoop(net, optimizer=opt)
    loop.train(rows, {str(name): split for name, split in sets.items()}, num_epochs=1)
    loop.train(stream, stream.take(8), max_steps=9)
    loop.train(sets["train"], sets["validation"], num_epochs=1)


def a_loader_of_torchdata(trainer: Trainer, stateful: StatefulDataLoader[Pair]) -> None:
    trainer.train(stateful, stateful, num_epochs=1)
    trainer.train(StatefulDataLoader(tensors, batch_size=8, shuffle=True), {"near": stateful}, max_steps=9)


def several_evaluation_sets(trainer: Trainer, sets: Mapping[str, Dataset[Pair]]) -> None:
    trainer.train(data, {"near": data, "far": data}, num_epochs=1)
    trainer.train(data, {"near": Labelled(), "far": Labelled()}, num_epochs=1)
    trainer.train(data, {"near": tensors, "far": tensors}, num_epochs=1)
    trainer.train(data, {"near": loader, "far": loader}, num_epochs=1)
    trainer.train(Stream(), {"near": Stream()}, max_steps=9)
    # A mapping with several types of values needs an annotation: mypy infers their common base class.
    named: Mapping[str, SizedDataset[Pair] | DataLoader[Pair]] = {"near": data, "far": loader, "list": pairs}
    trainer.train(data, named, num_epochs=1)
    assert_type(trainer.evaluate(named), dict[str, EvalResult])


def collate_functions(trainer: Trainer) -> None:
    trainer.train(data, collate_fn=to_pair, num_epochs=1)
    trainer.train(Sentences(), Sentences(), collate_fn=tokenise, num_epochs=1)
    trainer.train(Sentences(), {"near": Sentences()}, collate_fn=tokenise, num_epochs=1)
    trainer.train(Sentences(), collate_fn=tokenise_any, num_epochs=1)
    trainer.train(Sentences(), collate_fn=lambda sentences: tokenise(sentences), num_epochs=1)
    trainer.train(SentenceStream(), collate_fn=tokenise, max_steps=9)
    trainer.train(SentenceStream(), SentenceStream(), collate_fn=tokenise, max_time=60)
    assert_type(trainer.evaluate(Sentences(), collate_fn=tokenise), EvalResult)
    assert_type(trainer.predict(Sentences(), collate_fn=tokenise), list[Tensor])
    assert_type(trainer.stream_predictions(Sentences(), collate_fn=tokenise), Iterator[Tensor])
    assert_type(trainer.predict(Sentences(), collate_fn=tokenise_inputs), list[Tensor])
    assert_type(trainer.stream_predictions(Sentences(), collate_fn=tokenise_inputs), Iterator[Tensor])


def tokenise_inputs(sentences: list[str]) -> Tensor:
    return tokenise(sentences)[0]


def optional_collate_function(trainer: Trainer, collate: Callable[[list[str]], Pair] | None) -> None:
    trainer.train(Sentences(), Sentences(), collate_fn=collate, num_epochs=1)
    trainer.train(SentenceStream(), collate_fn=collate, max_steps=9)
    assert_type(trainer.evaluate(Sentences(), collate_fn=collate), EvalResult)
    assert_type(trainer.predict(Sentences(), collate_fn=collate), list[Tensor])


class CheckedInputsMixin(BatchMixin[Pair, OutputT]):
    @override
    def check_batch(self, batch: Pair) -> None:
        super().check_batch(batch)

    @override
    def predict_step(self, batch: Pair) -> OutputT:
        return super().predict_step(batch)


class CheckedTrainer(CheckedInputsMixin[Tensor], Trainer): ...


class CheckedClassifier(CheckedInputsMixin[Tensor], ClassificationTrainer): ...


class InputsOrPairs(ClassificationTrainer):
    @override
    def predict_step(self, batch: Pair | Tensor) -> Tensor:
        return super().predict_step(batch)

    @override
    def check_batch(self, batch: object) -> None:
        super().check_batch(batch)


class CheckedRegression(CheckedInputsMixin[Tensor], RegressionTrainer): ...


def lengths_of_a_run(trainer: Trainer, epochs: int | None, steps: int | None) -> None:
    trainer.train(data, num_epochs=1)
    trainer.train(data, max_steps=9)
    trainer.train(data, max_time=60)
    trainer.train(data, max_time=timedelta(hours=1))
    trainer.train(data, num_epochs=1, max_steps=9, max_time=60.5)
    trainer.train(data, num_epochs=None, max_steps=9)
    trainer.train(data, num_epochs=epochs, max_steps=steps)
    trainer.train(data, data, num_epochs=epochs, max_steps=steps, per_device_batch_size=4)
    trainer.train(Sentences(), collate_fn=tokenise, num_epochs=epochs, max_steps=steps)
    trainer.train(Stream(), max_time=60)
    trainer.train(Stream(), max_items=1e9)
    trainer.train(SentenceStream(), collate_fn=tokenise, max_items=10_000_000, max_time=60)
    trainer.train(data, num_epochs=1, max_items=100)
    trainer.train(Stream(), num_epochs=2, max_steps=9)


def options_of_training(trainer: Trainer) -> None:
    every: Cadence = Steps(500)
    trainer.train(data, data, num_epochs=1, per_device_batch_size=32, evaluate_every=every, evaluate_first=True)
    trainer.train(data, data, num_epochs=1, evaluate_every=Epochs(2), limit_batches=3, stop_check_every=10)
    trainer.train(data, data, num_epochs=1, evaluate_every=Minutes(0.5), data_is_sharded=True)
    trainer.train(data, num_epochs=1, train_dataloader_kwargs={"num_workers": 2, "drop_last": True})
    workers: DataLoaderKwargs = {
        "num_workers": 2,
        "pin_memory": True,
        "sampler": torch.utils.data.SequentialSampler([1]),
    }
    trainer.train(data, data, num_epochs=1, train_dataloader_kwargs=workers, eval_dataloader_kwargs=workers)
    options: TrainOptions = {"per_device_batch_size": 4, "evaluate_first": True}
    trainer.train(data, num_epochs=1, **options)
    evaluation: EvalOptions = {"per_device_batch_size": 4, "dataloader_kwargs": workers, "limit_batches": None}
    trainer.evaluate(data, **evaluation)
    trainer.predict(data, **evaluation)


# ==== results


def results(trainer: Trainer) -> None:
    history = trainer.train(data, data, num_epochs=1)
    assert_type(history, RunHistory)
    assert_type(trainer.history, RunHistory)
    assert_type(history[-1], EpochRecord)
    assert_type(history[1:], Sequence[EpochRecord])
    assert_type(history[-1].train_loss, float)
    assert_type(history[-1].eval_loss, float | None)
    assert_type(history[-1].metrics["accuracy"], float)
    assert_type(history[-1].evaluations["near"], EvalResult)
    assert_type(history[-1].values(), dict[str, float])
    assert_type(history.steps[-1], StepRecord)
    assert_type(history.steps[-1].loss, float)
    assert_type(history.initial, dict[str, EvalResult])
    assert_type(history.stop_reason, str | None)
    assert_type(history.to_dict(), dict[str, list[float]])
    assert_type(history.to_dataframe(), pd.DataFrame)
    assert_type([record.train_loss for record in history], list[float])
    assert_type(len(history), int)
    if (found := history[-1].eval_loss) is not None:
        assert_type(found < 0.5, bool)


def results_of_evaluation(trainer: Trainer) -> None:
    assert_type(trainer.evaluate(data), EvalResult)
    assert_type(trainer.evaluate(dataset=data, per_device_batch_size=64), EvalResult)
    assert_type(trainer.evaluate(Labelled()), EvalResult)
    assert_type(trainer.evaluate(tensors), EvalResult)
    assert_type(trainer.evaluate(loader), EvalResult)
    assert_type(trainer.evaluate(Stream()), EvalResult)
    assert_type(trainer.evaluate(pairs), EvalResult)
    assert_type(trainer.evaluate({"near": data, "far": data}), dict[str, EvalResult])
    assert_type(trainer.evaluate({"near": Labelled()}), dict[str, EvalResult])
    assert_type(trainer.evaluate({"near": Sentences()}, collate_fn=tokenise), dict[str, EvalResult])
    assert_type(trainer.evaluate({"near": data})["near"].loss, float)
    assert_type(trainer.evaluate(data).loss, float)
    assert_type(trainer.evaluate(data).metrics["accuracy"], float)
    assert_type(trainer.evaluate(data).values("test"), dict[str, float])


def results_of_prediction(trainer: Trainer) -> None:
    predictions = trainer.predict(data)
    assert_type(predictions, list[Tensor])
    assert_type(predictions[0], Tensor)
    assert_type(predictions[0].argmax(), Tensor)
    assert_type(predictions[:2], list[Tensor])
    assert_type([scores.argmax() for scores in predictions], list[Tensor])
    assert_type(torch.stack(predictions), Tensor)
    assert_type(trainer.predict(Unlabelled()), list[Tensor])
    assert_type(trainer.predict(Labelled()), list[Tensor])
    assert_type(trainer.predict(tensors), list[Tensor])
    assert_type(trainer.predict(loader), list[Tensor])
    assert_type(next(trainer.stream_predictions(data)), Tensor)


def what_a_trainer_has(trainer: Trainer) -> None:
    assert_type(trainer.model, nn.Module)
    assert_type(trainer.unwrapped_model, nn.Module)
    assert_type(trainer.optimizer, Optimizer)
    assert_type(trainer.accelerator, AcceleratorProtocol)
    assert_type(trainer.accelerator.device, torch.device)
    assert_type(trainer.accelerator.num_processes, int)
    assert_type(trainer.accelerator.is_main_process, bool)
    assert_type(trainer.accelerator.gather(torch.zeros(1)), Tensor)
    assert_type(trainer.device, torch.device)
    assert_type(trainer.run, Run)
    assert_type(trainer.run.plan, RunPlan)
    assert_type(trainer.run.seed, int)
    assert_type(trainer.progress, Progress)
    assert_type(trainer.progress.steps, int)
    assert_type(trainer.is_running, bool)
    assert_type(trainer.distributed.rank, int)
    assert_type(trainer.distributed.gather("name"), list[str])
    assert_type(trainer.loss_func, Callable[[Tensor, Tensor], Tensor])
    with trainer.accelerator.autocast():
        trainer.print("rank", trainer.distributed.rank)
    trainer.stop("tired")


# ==== ready-made trainers, composed and configured

Trainer(net, loss_func=loss, optimizer=opt)
Trainer(model=net, loss_func=cross_entropy, optimizer=opt)
Trainer(net, loss_func=lambda outputs, targets: (outputs - targets).mean(), optimizer=opt)
Trainer(net, loss_func=loss, optimizer=opt, default_callbacks=(), history_file=Path("history.jsonl"))
Trainer(net, loss_func=loss, optimizer=opt, default_callbacks=[*default_callbacks(), PrintMetrics(every="report")])
Trainer(
    net, loss_func=loss, optimizer=opt, callbacks=(ProgressBar(refresh_seconds=0.5), RestoreBestWeights("eval_loss"))
)
listeners_made_before = (StopOnNonFinite(), PrintMetrics(), RestoreBestWeights("eval_loss"))  # mypy needs a tuple
Trainer(net, loss_func=loss, optimizer=opt, callbacks=listeners_made_before)
make_trainer = functools.partial(Trainer, loss_func=loss, optimizer=opt)
made: Trainer = make_trainer(net)


class Everything(AMPMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, MetricsMixin, SeedMixin, Trainer):
    label_smoothing: float = 0.0
    names: Sequence[str] = field(default_factory=list)


everything = Everything(
    net,
    loss_func=loss,
    optimizer=opt,
    mixed_precision="bf16",
    gradient_accumulation_steps=4,
    max_grad_norm=1.0,
    create_scheduler=lambda optimizer, plan: OneCycleLR(optimizer, 0.1, total_steps=plan.total_steps),
    metrics={"accuracy": MulticlassAccuracy(num_classes=3)},
    train_metrics={"accuracy": MulticlassAccuracy(num_classes=3)},
    seed=1,
    label_smoothing=0.1,
    names=["zero", "one"],
    callbacks=[RestoreBestWeights(Monitor("accuracy", mode="max")), StopOnNonFinite()],
)
assert_type(everything.label_smoothing, float)
assert_type(everything.mixed_precision, Literal["no", "fp16", "bf16"] | None)
assert_type(everything.gradient_accumulation_steps, int)
everything.accumulation_schedule = {Steps(1000): 2, Steps(5000): 4}
everything.accumulation_schedule = {Epochs(3): 4}
assert_type(everything.spike_action, Literal["clip", "skip", "stop"])
assert_type(everything.metrics, Mapping[str, MetricLike])
assert_type(everything.seed, int | None)


class WithoutAnnotation(AMPMixin, GradClipMixin, Trainer):
    """A new default of an inherited option needs no annotation."""

    mixed_precision = "bf16"
    max_grad_norm = 1.0
    history_file = "history.jsonl"


class WithAnnotation(SeedMixin, GradClipMixin, Trainer):
    max_grad_norm: float | None = 2.0
    seed: int | None = 42
    loss_func: Callable[[Tensor, Tensor], Tensor] = cross_entropy


WithAnnotation(net, optimizer=opt)
WithAnnotation(net, optimizer=opt, seed=None, max_grad_norm=None, loss_func=loss)
WithoutAnnotation(net, loss_func=loss, optimizer=opt)
WithoutAnnotation(net, loss_func=loss, optimizer=opt, mixed_precision="no", max_grad_norm=None, history_file=None)
assert_type(WithAnnotation(net, optimizer=opt).seed, int | None)


class SmoothedTrainer(Everything):
    """A subclass of a composed trainer: its hooks have the types of its loop."""

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)

    @override
    def on_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_batch_end(batch, output)
        assert_type(batch[1], Tensor)
        assert_type(output.loss, Tensor)
        assert_type(output.outputs, Tensor)
        assert_type(output.logged, Mapping[str, Tensor])

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        output = super().eval_step(batch)
        return StepOutput(loss=output.loss, outputs=output.outputs.softmax(1), logged={"peak": output.outputs.max()})

    @override
    def update_metrics(self, batch: Pair, output: StepOutput[Tensor], metrics: Iterable[MetricLike]) -> None:
        for metric in metrics:
            metric.update(output.outputs.argmax(1), batch[1])


# ==== custom batches


@dataclass
class TokenBatch:
    tokens: Tensor
    targets: Tensor
    num_targets: int


class GraphBatch(NamedTuple):
    nodes: Tensor
    edges: Tensor


class ImageBatch(TypedDict):
    pixels: Tensor
    labels: Tensor


class Scores(NamedTuple):
    logits: Tensor
    embedding: Tensor


class LanguageModel(AMPMixin, GradClipMixin, MetricsMixin[TokenBatch, Tensor], TrainingLoop[TokenBatch, Tensor]):
    @override
    def count_items(self, batch: TokenBatch) -> float:
        return batch.num_targets

    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        logits = self.model(batch.tokens)
        return StepOutput.from_sum(cross_entropy(logits, batch.targets, reduction="sum"), outputs=logits)


class GraphLoop(MetricsMixin[GraphBatch, Scores], TrainingLoop[GraphBatch, Scores]):
    @override
    def train_step(self, batch: GraphBatch) -> StepOutput[Scores]:
        nodes, edges = batch
        scores = Scores(self.model(nodes, edges), nodes)
        return StepOutput(loss=scores.logits.mean(), outputs=scores)

    @override
    def predict_step(self, batch: GraphBatch) -> Scores:
        return self.eval_step(batch).outputs


class DictLoop(SeedMixin, TrainingLoop[dict[str, Tensor], dict[str, Tensor]]):
    @override
    def train_step(self, batch: dict[str, Tensor]) -> StepOutput[dict[str, Tensor]]:
        return StepOutput(loss=self.model(batch["x"]).mean(), outputs={"y": batch["x"]})


class ImageLoop(TrainingLoop[ImageBatch, None]):
    @override
    def train_step(self, batch: ImageBatch) -> StepOutput[None]:
        return StepOutput(loss=self.model(batch["pixels"]).mean(), outputs=None)


class Autoencoder(GradAccumMixin, TrainingLoop[Tensor]):
    """An omitted type argument has its default."""

    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        decoded: Tensor = self.model(batch)
        return StepOutput(loss=(decoded - batch).square().mean(), outputs=decoded)


class PairLoop(MetricsMixin, TrainingLoop[Pair, Tensor]):
    """`MetricsMixin` needs no type arguments if batches are pairs."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        outputs: Tensor = self.model(inputs)
        return StepOutput(loss=cross_entropy(outputs, targets), outputs=outputs)


class LabelLoop(TrainingLoop[Pair, Tensor, nn.Module, tuple[Tensor, int]]):
    """A fourth type argument is the type of samples, if the default collate function changes it."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        outputs: Tensor = self.model(inputs)
        return StepOutput(loss=cross_entropy(outputs, targets), outputs=outputs)


class ListLoop(TrainingLoop[Pair, list[Scores]]):
    """The outputs of a batch are a list with one element for each sample, which predictions consist of."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[list[Scores]]:
        raise NotImplementedError


class TensorsLoop(TrainingLoop[Pair, Tensor, nn.Module, tuple[Tensor, ...]]):
    """To pyright, the samples of a `TensorDataset` are tuples of any length."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return StepOutput(loss=cross_entropy(self.model(batch[0]), batch[1]), outputs=batch[0])


def custom_batches(batches: list[TokenBatch], graphs: Dataset[str], images: Unlabelled) -> None:
    language = LanguageModel(net, optimizer=opt, mixed_precision="bf16", max_grad_norm=1.0, metrics={})
    language.train(batches, batches, num_epochs=1)
    assert_type(language.predict(batches), list[Tensor])

    def to_graph(names: list[str]) -> GraphBatch:
        raise NotImplementedError

    graph = GraphLoop(net, optimizer=opt)
    graph.train(Sentences(), {"near": Sentences()}, collate_fn=to_graph, num_epochs=1)
    predictions = graph.predict(Sentences(), collate_fn=to_graph)
    assert_type(predictions, list[Scores])
    assert_type(predictions[0].embedding, Tensor)

    in_lists = ListLoop(net, optimizer=opt)
    assert_type(in_lists.predict(pairs), list[Scores])
    assert_type(in_lists.stream_predictions(pairs), Iterator[Scores])

    Autoencoder(net, optimizer=opt, gradient_accumulation_steps=2).train(images, images, num_epochs=1)
    Autoencoder(net, optimizer=opt).train(list(torch.ones(8, 4)), max_steps=9)
    DictLoop(net, optimizer=opt, seed=1).train([{"x": torch.zeros(4)}], num_epochs=1)
    ImageLoop(net, optimizer=opt).train(DataLoader(images), num_epochs=1)
    PairLoop(net, optimizer=opt, metrics={"loss": MeanMetric()}).train(pairs, data, num_epochs=1)
    TensorsLoop(net, optimizer=opt).train(tensors, {"near": tensors}, num_epochs=1)
    LabelLoop(net, optimizer=opt).train(Labelled(), {"near": Labelled()}, num_epochs=1)
    LabelLoop(net, optimizer=opt).train(LabelledStream(), Labelled(), max_steps=9)
    assert_type(LabelLoop(net, optimizer=opt).evaluate(Labelled()), EvalResult)
    assert_type(LabelLoop(net, optimizer=opt).predict(Labelled()), list[Tensor])
    assert_type(DictLoop(net, optimizer=opt).predict([{"x": torch.zeros(4)}])[0], dict[str, Tensor])


class TensorLoop(TrainingLoop[BatchT, Tensor], Generic[BatchT]):
    """A loop that is generic in its batches."""

    weight: float = 1.0

    @override
    def train_step(self, batch: BatchT) -> StepOutput[Tensor]:
        outputs: Tensor = self.model(batch)
        return StepOutput(loss=self.weight * outputs.mean(), outputs=outputs)


class OpenGraphLoop(AMPMixin, MetricsMixin[GraphBatch, Tensor], TensorLoop[GraphBatch]):
    pass


def generic_loops(graphs: list[GraphBatch]) -> None:
    TensorLoop[GraphBatch](net, optimizer=opt, weight=2.0).train(graphs, num_epochs=1)
    loop = OpenGraphLoop(net, optimizer=opt, weight=2.0, mixed_precision="no")
    loop.train(graphs, graphs, num_epochs=1)
    assert_type(loop.predict(graphs), list[Tensor])


def for_any_loop(loop: TrainingLoop[BatchT, Any], batches: SizedDataset[BatchT]) -> RunHistory:
    return loop.train(batches, num_epochs=1)


SampleT = TypeVar("SampleT")


def cross_validate(
    make: Callable[[], TrainingLoop[BatchT, OutputT, nn.Module, SampleT]], folds: Sequence[Sequence[SampleT]]
) -> list[RunHistory]:
    return [make().train(fold, num_epochs=1) for fold in folds]


def generic_functions(trainer: Trainer, pairs: list[Pair], labelled: list[tuple[Tensor, int]]) -> None:
    """A trainer takes samples: one for several types of samples is also one for each of them."""
    narrow: TrainingLoop[Pair, Tensor, nn.Module, Pair] = trainer
    assert_type(cross_validate(lambda: narrow, [pairs]), list[RunHistory])
    assert_type(cross_validate(lambda: trainer, [labelled, labelled]), list[RunHistory])
    assert_split_invariant(lambda: trainer, pairs)
    assert_split_invariant(lambda: trainer, tensors)
    assert_split_invariant(lambda: trainer, Labelled())
    assert_overfits_one_batch(trainer, pairs)
    find_learning_rate(trainer, Labelled())
    find_batch_size(trainer, Labelled(), global_batch_size=8)


# ==== custom mixins


class NoiseMixin(Mixin):
    """A mixin with options only, one of them without a default."""

    noise: float
    noise_kind: Literal["uniform", "normal"] = "normal"

    @override
    def check_options(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise={self.noise}: must not be negative.")


@dataclass
class Tally:
    batches: int = 0
    names: list[str] = field(default_factory=list)


TALLY: StateKey[Tally] = StateKey("tally")


class TallyMixin(BatchMixin[Any, Any]):
    """A mixin with a state of the run, for batches of any type: its hooks accept `object`.

    mypy accepts `BatchMixin[object, object]` too, but pyright requires equal type arguments of a common base.
    """

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.run[TALLY] = Tally()

    @override
    def on_batch_end(self, batch: object, output: StepOutput[object]) -> None:
        super().on_batch_end(batch, output)
        assert_type(self.run[TALLY], Tally)
        assert_type(self.run[TALLY].batches, int)
        self.run[TALLY].batches += 1

    @property
    def tally(self) -> Tally:
        return self.run[TALLY]


class EveryHookMixin(Mixin):
    """An override of a hook of each shape."""

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        builder.write(EveryHookMixin, mixed_precision="bf16")

    @override
    def train_value_names(self) -> frozenset[str]:
        return super().train_value_names() | {"loss_scale"}

    @override
    def compute_metrics(self) -> dict[str, float]:
        return super().compute_metrics() | {"one": 1.0}

    @override
    def accumulation_steps(self) -> int:
        return 2

    @override
    @contextlib.contextmanager
    def around_step(self) -> Generator[None]:
        with super().around_step():
            yield

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        step.logged["scale"] = 1.0
        assert_type(step.loss, Tensor)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        assert_type(record.train_loss, float)

    @override
    @replaces_super
    def on_exception(self, error: BaseException) -> None:
        self.print(type(error).__name__)

    @override
    def should_stop(self) -> str | None:
        return super().should_stop() or ("enough" if self.progress.steps > 10 else None)


class NewHookMixin(BatchMixin):
    """A mixin that declares hooks."""

    @hook("event")
    def on_overfit(self, gap: float) -> None:
        """The training loss fell far below the evaluation loss."""

    @hook("default")
    def allowed_gap(self, batch: Pair) -> float:
        return float(batch[0].mean())

    @override
    def on_eval_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_eval_batch_end(batch, output)
        self.on_overfit(self.allowed_gap(batch))


class GenericMixin(BatchMixin[BatchT, Tensor], Generic[BatchT]):
    """A mixin that is generic in its batches."""

    seen: list[BatchT] = field(default_factory=list)

    @override
    def count_items(self, batch: BatchT) -> float:
        self.seen.append(batch)
        return super().count_items(batch)


class RefiningMixin(BatchMixin[Pair, Tensor]):
    """A mixin that refines what a loop does, with `super()`."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        assert_type(super().train_step((-inputs, targets)), StepOutput[Tensor])
        return super().train_step((-inputs, targets))

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        return super().eval_step((-batch[0], batch[1]))

    @override
    def backward(self, loss: Tensor) -> None:
        super().backward(2 * loss)

    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        return super().make_train_dataloader(replace(request, kwargs={"drop_last": True}))

    @override
    def make_eval_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        return super().make_eval_dataloader(replace(request, per_device_batch_size=1))


class WrappingMixin(BatchMixin[Any, Any]):
    """A mixin that refines the step of any loop."""

    @override
    def train_step(self, batch: Any) -> StepOutput[Any]:
        return super().train_step(batch)


class Refined(RefiningMixin, WrappingMixin, MixUpMixin, Trainer): ...


class RefinedLoop(WrappingMixin, RefiningMixin, MixUpMixin, PairLoop): ...


class RefinedScores(WrappingMixin, MixUpMixin[Scores], TrainingLoop[Pair, Scores]):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Scores]:
        return super().train_step(batch)


class WrappedGraphLoop(WrappingMixin, GraphLoop): ...


Refined(net, loss_func=loss, optimizer=opt, mixup_alpha=0.2, cutmix_alpha=1.0, mixup_classes=10)
RefinedLoop(net, optimizer=opt, mixup_alpha=0.2, mixup_classes=10)
WrappedGraphLoop(net, optimizer=opt)


class OwnMixins(NoiseMixin, TallyMixin, EveryHookMixin, NewHookMixin, GenericMixin[Pair], MetricsMixin, Trainer):
    @override
    def on_overfit(self, gap: float) -> None:
        super().on_overfit(gap)
        assert_type(self.seen, list[Pair])

    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        assert_type(request.per_device_batch_size, int | None)
        return request.build(shuffle=False)


class OwnBatchesOwnMixins(TallyMixin, GenericMixin[TokenBatch], LanguageModel):
    """Mixins for wider batches and for the batches of the loop, before a complete loop."""


assert_type(OwnMixins(net, loss_func=loss, optimizer=opt, noise=0.1, noise_kind="uniform").noise, float)
assert_type(OwnBatchesOwnMixins(net, optimizer=opt).seen, list[TokenBatch])


# ==== callbacks


class Anywhere(Callback[object]):
    @override
    def on_epoch_end(self, trainer: object, record: EpochRecord) -> None:
        assert_type(record.eval_loss, float | None)

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (Monitor("accuracy", mode="max"),)


class ForAnyTrainer(Callback[TrainerCore]):
    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        assert_type(trainer.progress.steps, int)
        assert_type(step.learning_rate, float | Tensor)

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        assert_type(result.metrics.get("accuracy"), float | None)


class ForMetrics(Callback[SupportsMetrics]):
    @override
    def on_evaluation_start(self, trainer: SupportsMetrics, name: str) -> None:
        assert_type(trainer.metrics["accuracy"], MetricLike)


class HasNoise(Protocol):
    @property
    def noise(self) -> float: ...


class ForNoise(Callback[HasNoise]):
    @override
    def on_run_start(self, trainer: HasNoise) -> None:
        assert_type(trainer.noise, float)


class ForMine(Callback[OwnMixins]):
    @override
    def on_run_end(self, trainer: OwnMixins) -> None:
        assert_type(trainer.tally.batches, int)
        assert_type(trainer.history[-1].train_loss, float)


TrainerT = TypeVar("TrainerT", bound=TrainerCore)


class Logged(Callback[TrainerT]):
    """A callback that is generic in its trainer."""

    def __init__(self, describe: Callable[[TrainerT], str]) -> None:
        self.describe = describe

    @override
    def on_run_start(self, trainer: TrainerT) -> None:
        trainer.print(self.describe(trainer))


listeners: list[Callback[OwnMixins]] = [ForMine(), ForNoise(), ForMetrics(), ForAnyTrainer(), Anywhere()]
OwnMixins(net, loss_func=loss, optimizer=opt, noise=0.1, callbacks=listeners)
OwnMixins(net, loss_func=loss, optimizer=opt, noise=0.1, callbacks=[ForMine(), ForNoise(), ForMetrics()])
OwnMixins(net, loss_func=loss, optimizer=opt, noise=0.1, callbacks=[Logged[OwnMixins](lambda t: str(t.noise))])
PairLoop(net, optimizer=opt, callbacks=[ForMetrics(), Anywhere(), RestoreBestWeights("accuracy", mode="max")])


class WithListeners(GradClipMixin, Trainer):
    """A trainer that adds callbacks of its own."""

    @override
    def all_callbacks(self) -> Sequence[Callback[Any]]:
        return (*super().all_callbacks(), ForAnyTrainer())


# ==== protocols: objects that users pass, and what functions need


class Warmup:
    """A custom schedule that has no base class."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps

    def step(self) -> None:
        self.steps -= 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]


class Falling:
    """A custom schedule that depends on a value."""

    def step(self, metrics: float) -> None: ...

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None: ...


class Scheduled(LRSchedulerMixin, Trainer):
    pass


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, 0.1, total_steps=plan.total_steps)


def plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, patience=plan.num_epochs)


def make_schedule(optimizer: object, plan: object) -> LRSchedulerLike:
    raise NotImplementedError


class PreScheduled(LRSchedulerMixin, Trainer):
    create_scheduler: SchedulerFactory = one_cycle


Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=one_cycle)
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=plateau, scheduler_monitor="accuracy")
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=make_schedule, scheduler_interval="epoch")
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: StepLR(o, plan.steps_per_epoch))
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: LambdaLR(o, lambda step: 1.0))
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: ReduceLROnPlateau(o))
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: Warmup(o, plan.total_steps))
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, _: Falling())
PreScheduled(net, loss_func=loss, optimizer=opt)
PreScheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: Warmup(o, plan.num_epochs))


class CountMetric:
    """A custom metric that has no base class."""

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> float:
        return 0.0

    def reset(self) -> None: ...


class OwnTorchMetric(Metric):
    @override
    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    @override
    def compute(self) -> Tensor:
        raise NotImplementedError


collection = MetricCollection({"accuracy": MulticlassAccuracy(num_classes=3)})
own_metrics: dict[str, MetricLike] = {"count": CountMetric(), "own": OwnTorchMetric(), "many": collection}
PairLoop(net, optimizer=opt, metrics={"count": CountMetric(), "mean": MeanMetric()}, train_metrics=own_metrics)
PairLoop(net, optimizer=opt, metrics={"mean": MeanMetric()}, train_metrics={"many": collection})


def needs_protocols(trainer: Everything) -> None:
    assert_type(trainer.scheduler, SchedulerLike)
    precision: SupportsMixedPrecision = trainer
    accumulation: SupportsGradAccum = trainer
    clipping: SupportsGradClip = trainer
    schedule: SupportsLRScheduler = trainer
    metrics: SupportsMetrics = trainer
    seed: SupportsSeed = trainer
    stateful: Sequence[Stateful] = [trainer.model, trainer.optimizer, Warmup(opt, 3)]
    sized: Sequence[SizedDataset[Pair]] = [data, pairs, Plain()]
    assert_type(accumulation.gradient_accumulation_steps, int)
    assert_type(clipping.max_grad_norm, float | None)
    assert_type(seed.seed, int | None)
    loss_functions: Sequence[Callable[[Tensor, Tensor], Tensor]] = [loss, cross_entropy, nn.MSELoss()]


def with_a_mixin_or_without(trainer: TrainerCore) -> None:
    """A protocol can be checked at run time."""
    if isinstance(trainer, SupportsSeed):
        assert_type(trainer.seed, int | None)


class Saved(CheckpointMixin, MetricsMixin, Trainer):
    checkpoint_every = Steps(500)
    keep_best = Best("accuracy", mode="max")


def saves(trainer: Saved) -> None:
    checkpoints: SupportsCheckpoint = trainer
    assert_type(checkpoints.save_checkpoint(), str)
    assert_type(trainer.save_checkpoint("runs/digits/best", label="best"), str)
    trainer.load_checkpoint(Path("runs/digits"), weights_only=True)
    trainer.load_checkpoint("runs/digits", ignore={"model.head.*"})
    trainer.load_checkpoint("runs/digits", which="best")
    trainer.load_checkpoint("runs/digits", which=Best("accuracy", mode="max"))
    trainer.export_model("weights.safetensors", averages="ema")
    trainer.export_model("adapter.safetensors", trainable_only=True)


Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="x", resume=True, callbacks=[SaveBest("accuracy", "max")])
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="x", checkpoint_frozen=False)


# ==== the model


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)

    @override
    def forward(self, noise: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        fake: Tensor = self.generator(noise)
        return fake, self.discriminator(fake)

    def sample(self, count: int) -> Tensor:
        return torch.zeros(count, 4)


@dataclass
class LMOutput:
    loss: Tensor
    logits: Tensor


class LM(nn.Module):
    """A model that returns an output object, as those of transformers do."""

    @override
    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> LMOutput:
        raise NotImplementedError


class Chain(nn.Module):
    @overload
    def forward(self, inputs: Tensor) -> Tensor: ...
    @overload
    def forward(self, inputs: list[Tensor]) -> list[Tensor]: ...
    @override
    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return inputs


class GANLoop(AMPMixin, GradClipMixin, MetricsMixin[Tensor, Tensor], TrainingLoop[Tensor, Tensor, GAN]):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        assert_type(self.model, GAN)
        assert_type(self.model.generator, nn.Linear)
        assert_type(self.unwrapped_model.sample(3), Tensor)
        assert_type(self.forward(batch, scale=2.0), tuple[Tensor, Tensor])
        fake, score = self.forward(batch)
        return StepOutput(loss=score.mean(), outputs=fake)


class LMLoop(TrainingLoop[TokenBatch, Tensor, LM]):
    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        output = self.forward(batch.tokens, labels=batch.targets)
        assert_type(output, LMOutput)
        return StepOutput(loss=output.loss, outputs=output.logits)


class OneOfTwoLoop(TrainingLoop[Tensor, Tensor, GAN | LM]):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        assert_type(self.model, GAN | LM)
        outputs = self.model.sample(3) if isinstance(self.model, GAN) else batch
        return StepOutput(loss=outputs.mean(), outputs=outputs)


GanT = TypeVar("GanT", bound=GAN)


class OpenGANLoop(TrainingLoop[Tensor, Tensor, GanT], Generic[GanT]):
    """A loop that is generic in its model."""

    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        fake, score = self.forward(batch)
        assert_type(self.model, GanT)
        return StepOutput(loss=self.model.discriminator(fake).mean(), outputs=score)


class WideGAN(GAN):
    width: int = 2


class WideGANLoop(SeedMixin, GradAccumMixin, OpenGANLoop[WideGAN]): ...


class PairTrainer(AMPMixin, GradClipMixin, LRSchedulerMixin, Trainer[GAN]):
    """A composed trainer of one class of models."""


class TalliedGANLoop(TallyMixin, GenericMixin[Tensor], WrappingMixin, GANLoop):
    """Mixins that do not depend on the model."""


class ShowSample(Callback[HasModel[GAN]]):
    @override
    def on_epoch_end(self, trainer: HasModel[GAN], record: EpochRecord) -> None:
        assert_type(trainer.unwrapped_model.sample(1), Tensor)


class ForGANTrainer(Callback[Trainer[GAN]]):
    @override
    def on_run_end(self, trainer: Trainer[GAN]) -> None:
        assert_type(trainer.unwrapped_model, GAN)


class ForTrainer(Callback[Trainer]):
    @override
    def on_run_end(self, trainer: Trainer) -> None:
        assert_type(trainer.unwrapped_model, nn.Module)


gan = GAN()
assert_type(Trainer(net, loss_func=loss, optimizer=opt).model, nn.Linear)
assert_type(Trainer(gan, loss_func=loss, optimizer=opt), Trainer[GAN])
assert_type(Trainer(gan, loss_func=loss, optimizer=opt).unwrapped_model.generator, nn.Linear)
assert_type(Trainer(Chain(), loss_func=loss, optimizer=opt).forward([torch.zeros(1)]), list[Tensor])
assert_type(Everything(gan, loss_func=loss, optimizer=opt, create_scheduler=one_cycle).model, nn.Module)
assert_type(PairLoop(net, optimizer=opt).unwrapped_model, nn.Module)
assert_type(PairTrainer(gan, loss_func=loss, optimizer=opt, create_scheduler=one_cycle).model, GAN)
assert_type(WideGANLoop(WideGAN(), optimizer=opt).model.width, int)
assert_type(OpenGANLoop(WideGAN(), optimizer=opt).model, WideGAN)
assert_type(TalliedGANLoop(gan, optimizer=opt).seen, list[Tensor])
Trainer(gan, loss_func=loss, optimizer=opt, callbacks=[ForGANTrainer(), ForTrainer(), Anywhere()])
GANLoop(WideGAN(), optimizer=opt, callbacks=[ShowSample(), ForAnyTrainer(), RestoreBestWeights("eval_loss")])
trainers: list[Trainer] = [Trainer(net, loss_func=loss, optimizer=opt), Trainer(gan, loss_func=loss, optimizer=opt)]


def trainers_of_a_class_of_models(any_trainer: Trainer, trainer: Trainer[GAN], loop: OneOfTwoLoop) -> None:
    """A trainer of a class of models is also one of modules."""

    def sample(of: HasModel[GAN]) -> Tensor:
        return of.unwrapped_model.sample(3)

    assert_type(sample(trainer), Tensor)
    assert_type(sample(WideGANLoop(WideGAN(), optimizer=opt)), Tensor)
    any_trainer = trainer
    loops: Sequence[TrainingLoop[Any, Any]] = [any_trainer, loop]
    find_learning_rate(trainer, Labelled())
    assert_overfits_one_batch(trainer, pairs)
    assert_split_invariant(lambda: trainer, pairs)


# ---- several optimizers


class Alternating(
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin[Tensor, Tensor],
    MultiUpdateLoop[Tensor, Tensor, GAN],
):
    @override
    def train_updates(self, batch: Tensor) -> Iterator[Update[Tensor]]:
        fake: Tensor = self.model.generator(batch)
        loss: Tensor = self.model.discriminator(fake.detach()).mean()
        yield Update("discriminator", loss=loss, logged={"score": loss.detach()})
        if self.progress.steps % 5 == 4:
            yield Update("generator", loss=-self.model.discriminator(fake).mean(), outputs=fake)

    @override
    def eval_step(self, batch: Tensor) -> StepOutput[Tensor]:
        fake, score = self.forward(batch)
        return StepOutput(loss=score.mean(), outputs=fake)


by_name = OptimizerDict({"generator": opt, "discriminator": torch.optim.SGD(gan.discriminator.parameters(), lr=0.1)})
assert_type(by_name["generator"], torch.optim.Optimizer)
Alternating(gan, optimizer=by_name, create_scheduler=one_cycle, create_scheduler_of={"generator": one_cycle})
Trainer(net, loss_func=loss, optimizer=OptimizerDict({"muon": opt}))
torch.optim.AdamW(decay_groups(nn.Sequential(net), lr=1e-3, weight_decay=0.05, no_decay=["*.weight", nn.Linear]))


def gathered_rows(trainer: Alternating, rows: Tensor) -> None:
    assert_type(trainer.gather_with_grad(rows), tuple[Tensor, Tensor])


def several_updates(trainer: Alternating, noise: list[Tensor]) -> None:
    assert_type(trainer.optimizer, torch.optim.Optimizer)
    assert_type(trainer.schedulers["generator"], SchedulerLike)
    assert_type(trainer.train(noise, num_epochs=1), RunHistory)


# ---- closures, freezing and values


class Sharp(FreezeMixin, ClosureMixin, GradAccumMixin, Trainer): ...


Sharp(gan, loss_func=loss, optimizer=torch.optim.LBFGS(gan.parameters()), gradient_accumulation_steps=2)
Sharp(gan, loss_func=loss, optimizer=opt, frozen=["generator"], unfreeze_at={"generator.*": Epochs(1), "0": Steps(5)})
Sharp(gan, loss_func=loss, optimizer=opt, unfreeze_at=gradual_unfreezing(["generator", "discriminator"]))


class Watch(Callback[TrainerCore]):
    @override
    def on_values(self, trainer: TrainerCore, values: Mapping[str, float], step: int) -> None:
        trainer.log({"doubled": 2 * values["train_loss"], "steps": step, "tensor": torch.zeros(())})
        assert_type(trainer.history.values[-1].values, Mapping[str, float])
        assert_type([record.loss for record in trainer.history.evaluations], list[float])


Trainer(net, loss_func=loss, optimizer=opt, callbacks=[Watch()], log_every=None)
Trainer(net, loss_func=loss, optimizer=opt, log_every=Minutes(1))


# ---- models of transformers


class Sentiment(SeedMixin, SequenceClassificationTrainer[BertForSequenceClassification]):
    @override
    def count_items(self, batch: Mapping[str, Any]) -> float:
        return len(batch["labels"])


class Writer(GradAccumMixin, CausalLMTrainer): ...


def encode(texts: list[str]) -> BatchEncoding:
    return BatchEncoding({"input_ids": torch.zeros(len(texts), 3)})


def transformer_trainers(
    sentiment: Sentiment,
    tagger: TokenClassificationTrainer,
    writer: Writer,
    translator: Seq2SeqTrainer,
    samples: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert_type(sentiment.model, BertForSequenceClassification)
    padding = DataCollatorWithPadding(tokenizer)
    sentiment.train(samples, {"near": samples}, collate_fn=padding, num_epochs=1)
    sentiment.train(["good"], collate_fn=encode, num_epochs=1)
    assert_type(sentiment.predict(samples, collate_fn=padding), list[Tensor])
    tagger.train(samples, samples, collate_fn=DataCollatorForTokenClassification(tokenizer), num_epochs=1)
    writer.train(samples, samples, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False), num_epochs=1)
    translator.train(samples, samples, collate_fn=DataCollatorForSeq2Seq(tokenizer), num_epochs=1)
    translator.decode = functools.partial(tokenizer.batch_decode, skip_special_tokens=True)
    sentiment.callbacks = [SavePretrained("best", "accuracy", mode="max", processor=tokenizer)]


# ---- ready trainers


class Augmented(CheckpointMixin, AMPMixin, GradClipMixin, ClassificationTrainer[nn.Linear]):
    label_smoothing = 0.1
    mixup_alpha = 0.2

    @override
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert_type(self.model, nn.Linear)
        return super().compute_eval_loss(outputs, targets) + outputs.square().mean()


class Hinge(GradAccumMixin, GANTrainer[GAN]):
    @override
    def compute_discriminator_loss(self, real: Tensor, generated: Tensor) -> Tensor:
        return (1 - real).relu().mean() + (1 + generated).relu().mean()


class ImagesAndTexts(ContrastiveTrainer[nn.ModuleDict]):
    @override
    def embed(self, batch: Pair) -> tuple[Tensor, Tensor]:
        return self.model["image"](batch[0]), self.model["text"](batch[1])


class SavedTeacher(CheckpointMixin, DistillationTrainer):
    teacher: nn.Module


Augmented(net, optimizer=opt, num_classes=3, checkpoint_dir="runs", top_k=[2], per_class_accuracy=True)
assert_type(ClassificationTrainer(net, optimizer=opt, num_classes=3), ClassificationTrainer[nn.Linear])
ClassificationTrainer(net, optimizer=opt, num_classes=3, loss_func=loss, metrics={"own": MulticlassAccuracy(3)})
RegressionTrainer(net, optimizer=opt, scores=["rmse", "r2"])
SegmentationTrainer(
    net, optimizer=opt, num_classes=3, per_class_iou=True, loss_func=nn.CrossEntropyLoss(ignore_index=255)
)
SavedTeacher(net, optimizer=opt, loss_func=loss, teacher=nn.Linear(2, 1), temperature=4, checkpoint_dir="runs")
ContrastiveTrainer(net, optimizer=opt, temperature=0.5)
ImagesAndTexts(nn.ModuleDict({"image": nn.Linear(2, 1), "text": nn.Linear(3, 1)}), optimizer=opt)
assert_type(Hinge(gan, optimizer=by_name, latent_size=2, gan_loss="wasserstein", gradient_penalty=10).model, GAN)


def ready_trainers(classifier: Augmented, views: ContrastiveTrainer, hinge: Hinge) -> None:
    classifier.train(Labelled(), Labelled(), num_epochs=1)
    assert_type(classifier.predict([torch.zeros(2)]), list[Tensor])
    views.train([(torch.zeros(2), torch.zeros(2))], num_epochs=1)
    hinge.train([torch.zeros(4)], num_epochs=1)
    assert_type(hinge.generate(torch.zeros(1, 2)), Tensor)
