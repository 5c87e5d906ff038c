"""Mistakes that type checkers reject, each next to its correct form. Nothing here is run.

A wrong line ends in a `type: ignore` with the code of mypy's error. mypy `--strict` reports an unused ignore, so the line
fails if mypy no longer rejects the mistake. pyright rejects every mistake too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from typing_extensions import override

from ptacc import (
    AcceleratorBuilder,
    AMPMixin,
    BatchMixin,
    Best,
    Callback,
    CheckpointMixin,
    DataLoaderConfig,
    EpochRecord,
    Epochs,
    EvalResult,
    FreezeMixin,
    GradAccumMixin,
    GradClipMixin,
    Items,
    LRSchedulerMixin,
    MetricsMixin,
    Mixin,
    MixUpMixin,
    Monitor,
    MultiUpdateLoop,
    OptimizerDict,
    Pair,
    RestoreBestWeights,
    RunPlan,
    SaveBest,
    SeedMixin,
    StateKey,
    StepOutput,
    StepResult,
    Steps,
    Trainer,
    TrainerCore,
    TrainingLoop,
    Update,
    hook,
)
from ptacc.protocols import HasModel, MetricLike, SupportsGradClip, SupportsMetrics
from ptacc.testing import assert_split_invariant

net = nn.Linear(4, 3)
loss = nn.CrossEntropyLoss()
opt = torch.optim.SGD(net.parameters(), lr=0.1)


class Digits(Dataset[Pair]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> Pair:
        raise NotImplementedError


class Records(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise NotImplementedError


class Stream(IterableDataset[Pair]):
    @override
    def __iter__(self) -> Iterator[Pair]:
        raise NotImplementedError


@dataclass
class TokenBatch:
    tokens: Tensor
    targets: Tensor
    mask: Tensor


class ImageBatch(TypedDict):
    pixels: Tensor
    labels: Tensor


class TokenLoop(TrainingLoop[TokenBatch, Tensor]):
    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        logits: Tensor = self.model(batch.tokens)
        return StepOutput(loss=cross_entropy(logits, batch.targets), outputs=logits)


class Accumulating(GradAccumMixin, Trainer):
    label_smoothing: float = 0.0


class Mixed(AMPMixin, GradClipMixin, Trainer):
    pass


class Scheduled(LRSchedulerMixin, Trainer):
    pass


class Measured(MetricsMixin, Trainer):
    pass


def show(value: object) -> None: ...


data = Digits()
trainer = Trainer(net, loss_func=loss, optimizer=opt)
measured = Measured(net, loss_func=loss, optimizer=opt)


# ==== composition: the bases and their order


# 01 a mixin after the trainer whose hooks it should override
class Early(AMPMixin, Trainer): ...


class Late(Trainer, AMPMixin): ...  # type: ignore[misc]


# 02 a mixin after a loop, with others before it
class EarlyWithOthers(SeedMixin, GradClipMixin, TokenLoop): ...


class LateWithOthers(SeedMixin, TokenLoop, GradClipMixin): ...  # type: ignore[misc]


# 03 two mixins that declare one option with different types
class NoiseMixin(Mixin):
    level: float = 0.0


class VerboseMixin(Mixin):
    level: str = "info"


class Noisy(NoiseMixin, Trainer): ...


class NoisyAndVerbose(NoiseMixin, VerboseMixin, Trainer): ...  # type: ignore[misc]


# ==== batch types that disagree


# 04 metrics for pairs with a loop over other batches
class TokenMetrics(MetricsMixin[TokenBatch, Tensor], TokenLoop): ...


class PairMetrics(MetricsMixin, TokenLoop): ...  # type: ignore[misc]


# 05 a batch mixin for other batches than the trainer's
class CountPairs(BatchMixin[Pair, Tensor]): ...


class CountTokens(BatchMixin[TokenBatch, Tensor]): ...


class CountsPairs(CountPairs, Trainer): ...


class CountsTokens(CountTokens, Trainer): ...  # type: ignore[misc]


# 06 a batch mixin for other outputs than the loop's
class TokenOutputs(BatchMixin[TokenBatch, Tensor]): ...


class TokenOutputDicts(BatchMixin[TokenBatch, dict[str, Tensor]]): ...


class RightOutputs(TokenOutputs, TokenLoop): ...


class WrongOutputs(TokenOutputDicts, TokenLoop): ...  # type: ignore[misc]


# ==== what is required


# 07 the step is not defined
class NoStep(AMPMixin, TrainingLoop[Pair, Tensor]): ...


NoStep(net, optimizer=opt)  # type: ignore[abstract]

# 08 the optimizer is missing
Trainer(net, loss_func=loss, optimizer=opt)
Trainer(net, loss_func=loss)  # type: ignore[call-arg]

# 09 an option without a default is missing
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: StepLR(o, plan.steps_per_epoch))
Scheduled(net, loss_func=loss, optimizer=opt)  # type: ignore[call-arg]


# ==== names of options

# 10 an option misspelt
Accumulating(net, loss_func=loss, optimizer=opt, gradient_accumulation_steps=4)
Accumulating(net, loss_func=loss, optimizer=opt, gradient_accumulation_step=4)  # type: ignore[call-arg]

# 11 an option of a mixin that is not composed
Mixed(net, loss_func=loss, optimizer=opt, max_grad_norm=1.0)
Trainer(net, loss_func=loss, optimizer=opt, max_grad_norm=1.0)  # type: ignore[call-arg]

# 12 a trainer's own option with a wrong name
Accumulating(net, loss_func=loss, optimizer=opt, label_smoothing=0.1)
Accumulating(net, loss_func=loss, optimizer=opt, smoothing=0.1)  # type: ignore[call-arg]


# ==== keywords

# 13 positional options
Trainer(net, optimizer=opt, loss_func=loss)
Trainer(net, opt, loss_func=loss)  # type: ignore[call-arg]


def positional_arguments() -> None:
    # 14 a positional number of epochs
    trainer.train(data, data, num_epochs=8)
    trainer.train(data, data, 8)  # type: ignore[call-overload]

    # 15 a positional batch size
    trainer.evaluate(data, per_device_batch_size=64)
    trainer.evaluate(data, 64)  # type: ignore[call-overload]


# ==== values of options

# 16 an invalid precision
Mixed(net, loss_func=loss, optimizer=opt, mixed_precision="bf16")
Mixed(net, loss_func=loss, optimizer=opt, mixed_precision="bf61")  # type: ignore[arg-type]

# 17 a string instead of a number, as from the command line
Mixed(net, loss_func=loss, optimizer=opt, max_grad_norm=float("1.0"))
Mixed(net, loss_func=loss, optimizer=opt, max_grad_norm="1.0")  # type: ignore[arg-type]

# 18 a float instead of an integer
Accumulating(net, loss_func=loss, optimizer=opt, gradient_accumulation_steps=32 // 8)
Accumulating(net, loss_func=loss, optimizer=opt, gradient_accumulation_steps=32 / 8)  # type: ignore[arg-type]


# ==== new defaults in a class body


class RightDefaults(AMPMixin, GradClipMixin, SeedMixin, Trainer):
    mixed_precision: Literal["no", "fp16", "bf16"] | None = "bf16"
    max_grad_norm: float | None = 1.0
    seed: int | None = 42


# 19 an invalid value
class WrongPrecision(AMPMixin, Trainer):
    mixed_precision = "fp32"  # type: ignore[assignment]


# 20 a value of another type
class WrongSeed(SeedMixin, Trainer):
    seed = "42"  # type: ignore[assignment]


# 21 an option redeclared with another type
class WrongType(GradClipMixin, Trainer):
    max_grad_norm: str = "1.0"  # type: ignore[assignment]


# ==== components

# 22 the optimizer's class instead of an optimizer
Trainer(net, loss_func=loss, optimizer=torch.optim.SGD(net.parameters()))
Trainer(net, loss_func=loss, optimizer=torch.optim.SGD)  # type: ignore[arg-type]

# 23 the loss's class instead of a loss
Trainer(net, loss_func=nn.CrossEntropyLoss(), optimizer=opt)
Trainer(net, loss_func=nn.CrossEntropyLoss, optimizer=opt)  # type: ignore[arg-type]

# 24 parameters instead of the model
Trainer(net, loss_func=loss, optimizer=opt)
Trainer(net.parameters(), loss_func=loss, optimizer=opt)  # type: ignore[type-var]


# ==== callbacks passed to a trainer


class NeedsMetrics(Callback[SupportsMetrics]):
    @override
    def on_evaluation_start(self, trainer: SupportsMetrics, name: str) -> None:
        show(trainer.metrics.keys())


# 25 a callback that needs a mixin that the trainer does not have
Measured(net, loss_func=loss, optimizer=opt, callbacks=[NeedsMetrics()])
Trainer(net, loss_func=loss, optimizer=opt, callbacks=[NeedsMetrics()])  # type: ignore[list-item]

# 26 the callback's class instead of a callback
Trainer(net, loss_func=loss, optimizer=opt, callbacks=[RestoreBestWeights("eval_loss")])
Trainer(net, loss_func=loss, optimizer=opt, callbacks=[RestoreBestWeights])  # type: ignore[list-item]

# 27 one callback instead of a sequence
Trainer(net, loss_func=loss, optimizer=opt, callbacks=(RestoreBestWeights("eval_loss"),))
Trainer(net, loss_func=loss, optimizer=opt, callbacks=RestoreBestWeights("eval_loss"))  # type: ignore[arg-type]


# ==== definitions of callbacks


class Prints(Callback[Trainer]):
    # 28 an attribute that the trainer does not have
    @override
    def on_run_start(self, trainer: Trainer) -> None:
        show(trainer.progress.steps)
        show(trainer.progress.step)  # type: ignore[attr-defined]

    # 29 a misspelt event
    @override
    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None: ...
    @override
    def on_epoch_finish(self, trainer: Trainer, record: EpochRecord) -> None: ...  # type: ignore[misc]

    # 30 an event without all of its arguments
    @override
    def on_evaluation_end(self, trainer: Trainer, name: str, result: EvalResult) -> None: ...
    @override
    def on_step_end(self, trainer: Trainer) -> None: ...  # type: ignore[override]


# ==== arguments of callbacks


class Reads(Callback[TrainerCore]):
    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        # 31 an evaluation loss that may be None
        show(record.eval_loss is not None and record.eval_loss < 0.1)
        show(record.eval_loss < 0.1)  # type: ignore[operator]

        # 32 a metric read as an attribute
        show(record.metrics["accuracy"])
        show(record.accuracy)  # type: ignore[attr-defined]

    # 33 a misspelt value
    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        show(step.learning_rate)
        show(step.lr)  # type: ignore[attr-defined]


# ==== the step


class PairLoop(TrainingLoop[Pair, Tensor]):
    # 34 the batch unpacked into too many values
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        inputs, targets, mask = batch  # type: ignore[misc]
        logits: Tensor = self.model(inputs)
        return StepOutput(loss=cross_entropy(logits, targets), outputs=logits)

    # 35 the outputs returned instead of the step's result
    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        logits: Tensor = self.model(batch[0])
        if len(logits):
            return StepOutput(loss=cross_entropy(logits, batch[1]), outputs=logits)
        return logits  # type: ignore[return-value]

    # 36 the step's result returned instead of the outputs
    @override
    def predict_step(self, batch: Pair) -> Tensor:
        if len(batch[0]):
            return self.eval_step(batch).outputs
        return self.eval_step(batch)  # type: ignore[return-value]


# ==== what a step returns


def outputs_of_a_step(mean: Tensor, logits: Tensor) -> None:
    # 37 the loss as a float, which has no gradient
    StepOutput(loss=mean, outputs=logits)
    StepOutput(loss=mean.item(), outputs=logits)  # type: ignore[arg-type]

    # 38 the outputs missing
    StepOutput(loss=mean, outputs=None)
    StepOutput(loss=mean)  # type: ignore[call-arg]

    # 39 a logged float, which would synchronise the device
    StepOutput(loss=mean, outputs=logits, logged={"peak": logits.max()})
    StepOutput(loss=mean, outputs=logits, logged={"peak": logits.max().item()})  # type: ignore[dict-item]


# ==== custom batches


class Images(TrainingLoop[ImageBatch, Tensor]):
    # 40 a misspelt key
    @override
    def train_step(self, batch: ImageBatch) -> StepOutput[Tensor]:
        show(batch["labels"])
        show(batch["label"])  # type: ignore[typeddict-item]
        return StepOutput(loss=self.model(batch["pixels"]).mean(), outputs=batch["labels"])


class Tokens(TokenLoop):
    # 41 a misspelt field
    @override
    def count_items(self, batch: TokenBatch) -> int:
        show(batch.targets)
        show(batch.target)  # type: ignore[attr-defined]
        return batch.targets.numel()

    # 42 a hook for other batches than the loop's
    @override
    def on_eval_batch_end(self, batch: TokenBatch, output: StepOutput[Tensor]) -> None:
        super().on_eval_batch_end(batch, output)

    @override
    def on_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:  # type: ignore[override]
        show(batch[0])


# ==== overrides of hooks


class Hooks(Trainer):
    # 43 a misspelt field of the step's result
    @override
    def on_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_batch_end(batch, output)
        show(output.loss)
        show(output.los)  # type: ignore[attr-defined]

    # 44 a stop without a reason
    @override
    def should_stop(self) -> str | None:
        return super().should_stop() or ("enough" if self.progress.steps > 10 else None)


class MoreHooks(Trainer):
    @override
    def should_stop(self) -> bool:  # type: ignore[override]
        return super().should_stop() is not None or self.progress.steps > 10

    # 45 an around hook without `contextmanager`
    @override
    @contextlib.contextmanager
    def around_epoch(self) -> Generator[None]:
        with super().around_epoch():
            yield

    @override
    def around_step(self) -> Iterator[None]:  # type: ignore[override]
        with super().around_step():
            yield


# ==== definitions of mixins


# 46 a hook of batches in a mixin without batches
class CountsRight(BatchMixin[TokenBatch, Tensor]):
    @override
    def count_items(self, batch: TokenBatch) -> int:
        return batch.targets.numel()


class CountsNothing(Mixin):
    @override
    def count_items(self, batch: TokenBatch) -> int:  # type: ignore[misc]
        return batch.targets.numel()


# 47 an invalid shape of a hook
class Declares(Mixin):
    @hook("event")
    def on_tea_break(self) -> None: ...
    @hook("evnt")  # type: ignore[arg-type]
    def on_coffee_break(self) -> None: ...


# 48 a misspelt setting of the accelerator
class Configures(Mixin):
    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        builder.write(Configures, mixed_precision="bf16")
        builder.write(Configures, mixed_precison="bf16")  # type: ignore[call-arg]


# ==== data


def wrong_data(records: Records) -> None:
    # 49 samples of the wrong type
    trainer.train(data, num_epochs=1)
    trainer.train(records, num_epochs=1)  # type: ignore[arg-type]

    # 50 an evaluation set with samples of another type
    trainer.train(data, data, num_epochs=1)
    trainer.train(data, records, num_epochs=1)  # type: ignore[arg-type]

    # 51 the name of a folder instead of a dataset
    trainer.train(train_dataset=data, num_epochs=1)
    trainer.train(train_dataset="data/train", num_epochs=1)  # type: ignore[arg-type]


# ==== data of evaluations and predictions


def other_data(records: Records) -> None:
    # 52 samples of the wrong type in an evaluation
    trainer.evaluate(data)
    trainer.evaluate(records)  # type: ignore[arg-type]

    # 53 samples of the wrong type in named sets
    right, wrong = {"near": data, "far": data}, {"near": records, "far": records}
    trainer.evaluate(right)
    trainer.evaluate(wrong)  # type: ignore[arg-type]

    # 54 samples of the wrong type in a prediction
    trainer.predict(data)
    trainer.predict(records)  # type: ignore[arg-type]


# ==== data loading


def right_collate(samples: list[Pair]) -> Pair:
    raise NotImplementedError


def dict_collate(samples: list[Pair]) -> dict[str, Tensor]:
    raise NotImplementedError


def loading() -> None:
    # 55 a collate function that returns the wrong type of batch
    trainer.train(data, collate_fn=right_collate, num_epochs=1)
    trainer.train(data, collate_fn=dict_collate, num_epochs=1)  # type: ignore[arg-type]

    # 56 a misspelt keyword of the loader
    trainer.train(data, num_epochs=1, train_dataloader_kwargs={"num_workers": 2})
    trainer.train(data, num_epochs=1, train_dataloader_kwargs={"num_worker": 2})  # type: ignore[call-overload]

    # 57 the wrong name of the batch size
    trainer.train(data, num_epochs=1, per_device_batch_size=32)
    trainer.train(data, num_epochs=1, batch_size=32)  # type: ignore[call-overload]


# ==== the length of a run


def length_of_a_run(stream: Stream) -> None:
    # 58 a run without an end
    trainer.train(data, num_epochs=8)
    trainer.train(data)  # type: ignore[call-overload]

    # 59 epochs of data without a length
    trainer.train(stream, max_steps=100)
    trainer.train(stream, num_epochs=8)  # type: ignore[call-overload]

    # 60 a cadence instead of a number of steps
    trainer.train(data, max_steps=500)
    trainer.train(data, max_steps=Steps(500))  # type: ignore[call-overload]


# ==== cadences


def cadences() -> None:
    # 61 a number without a unit
    trainer.train(data, data, num_epochs=1, evaluate_every=Steps(500))
    trainer.train(data, data, num_epochs=1, evaluate_every=500)  # type: ignore[call-overload]

    # 62 a string
    trainer.train(data, data, num_epochs=1, evaluate_every=Epochs(1))
    trainer.train(data, data, num_epochs=1, evaluate_every="epoch")  # type: ignore[call-overload]

    # 63 a fraction of an epoch
    show(Steps(100))
    show(Epochs(0.5))  # type: ignore[arg-type]


# ==== results of evaluation


def results_of_evaluation(result: EvalResult) -> None:
    # 64 a result used as a mapping
    show(result.loss)
    show(result["loss"])  # type: ignore[index]

    # 65 the results of several sets used as one result
    show(trainer.evaluate({"near": data, "far": data})["near"].loss)
    show(trainer.evaluate({"near": data, "far": data}).loss)  # type: ignore[attr-defined]

    # 66 an assignment to a field of a result
    show(EvalResult(loss=0.0, metrics=result.metrics))
    result.loss = 0.0  # type: ignore[misc]


# ==== predictions


def predictions() -> None:
    # 67 predictions used as one tensor
    show(trainer.predict(data)[0].argmax())
    show(trainer.predict(data).argmax())  # type: ignore[attr-defined]

    # 68 a prediction used as a step's result
    show(trainer.predict(data)[0])
    show(trainer.predict(data)[0].outputs)  # type: ignore[attr-defined]

    # 69 several sets in one prediction
    sets = {"near": data, "far": data}
    show({name: trainer.predict(dataset) for name, dataset in sets.items()})
    show(trainer.predict(sets))  # type: ignore[arg-type]


# ==== history


def histories() -> None:
    history = trainer.train(data, num_epochs=1)

    # 70 a value read from the history instead of an epoch
    show([record.train_loss for record in history])
    show(history.train_loss)  # type: ignore[attr-defined]

    # 71 an epoch looked up by the name of a value
    show(history.to_dict()["train_loss"])
    show(history["train_loss"])  # type: ignore[call-overload]

    # 72 batches instead of steps
    show(history.steps[-1].step)
    show(history.batches[-1].step)  # type: ignore[attr-defined]


# ==== metrics


# 73 metrics without names
Measured(net, loss_func=loss, optimizer=opt, metrics={"mean": MeanMetric()})
Measured(net, loss_func=loss, optimizer=opt, metrics=[MeanMetric()])  # type: ignore[arg-type]

# 74 the metric's class instead of a metric
Measured(net, loss_func=loss, optimizer=opt, train_metrics={"mean": MeanMetric()})
Measured(net, loss_func=loss, optimizer=opt, train_metrics={"mean": MeanMetric})  # type: ignore[dict-item]


class ArgmaxMetrics(MetricsMixin, Trainer):
    @override
    def update_metrics(self, batch: Pair, output: StepOutput[Tensor], metrics: Iterable[MetricLike]) -> None: ...


# 75 the outputs instead of the step's result
class WrongMetrics(MetricsMixin, Trainer):
    @override
    def update_metrics(self, batch: Pair, output: Tensor, metrics: Iterable[MetricLike]) -> None: ...  # type: ignore[override]


# ==== schedules


def schedule(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, plan.steps_per_epoch)


def schedule_without_plan(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 1)


# 76 a factory without the argument `plan`
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=schedule)
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=schedule_without_plan)  # type: ignore[arg-type]

# 77 a schedule instead of a factory
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: StepLR(o, 1))
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=StepLR(opt, 1))  # type: ignore[arg-type]


# 78 a misspelt field of the plan
def right_schedule(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, plan.total_steps)


def wrong_schedule(optimizer: Optimizer, plan: RunPlan) -> StepLR:
    return StepLR(optimizer, plan.max_steps)  # type: ignore[attr-defined]


# ==== protocols


class Warmup:
    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Forgetful:
    def step(self) -> None: ...


# 79 a custom schedule without a state
def make_warmup(optimizer: Optimizer, plan: RunPlan) -> Warmup:
    return Warmup()


def make_forgetful(optimizer: Optimizer, plan: RunPlan) -> Forgetful:
    return Forgetful()


Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=make_warmup)
Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=make_forgetful)  # type: ignore[arg-type]


# 80 a custom metric without `reset`
class Count:
    def update(self, outputs: Tensor, targets: Tensor) -> None: ...
    def compute(self) -> float:
        return 0.0


Measured(net, loss_func=loss, optimizer=opt, metrics={"mean": MeanMetric()})
Measured(net, loss_func=loss, optimizer=opt, metrics={"count": Count()})  # type: ignore[dict-item]


# 81 a trainer without the mixin that a function needs
def read_limit(clipping: SupportsGradClip) -> float | None:
    return clipping.max_grad_norm


read_limit(Mixed(net, loss_func=loss, optimizer=opt))
read_limit(trainer)  # type: ignore[arg-type]


# ==== monitors

# 82 an invalid mode
RestoreBestWeights("accuracy", mode="max")
RestoreBestWeights("accuracy", mode="maximum")  # type: ignore[arg-type]

# 83 the metric instead of its name
RestoreBestWeights(Monitor("accuracy"))
RestoreBestWeights(MeanMetric())  # type: ignore[arg-type]


class Watches(Callback[object]):
    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (Monitor("accuracy"),)


# 84 names instead of monitors
class WatchesNames(Callback[object]):
    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return ("accuracy",)  # type: ignore[return-value]


# ==== the state of a run

COUNT: StateKey[int] = StateKey("count")


def states() -> None:
    # 85 a state of another type than its key's
    trainer.run[COUNT] = 1
    trainer.run[COUNT] = "one"  # type: ignore[misc]

    # 86 a state used as another type
    show(trainer.run[COUNT] + 1)
    show(trainer.run[COUNT] + "one")  # type: ignore[operator]

    # 87 a state looked up by a name, which has no type
    show(trainer.run[COUNT])
    show(trainer.run["count"])  # type: ignore[index]


# ==== what a trainer has


def what_a_trainer_has() -> None:
    # 88 a misspelt attribute of the accelerator
    show(trainer.accelerator.num_processes)
    show(trainer.accelerator.num_process)  # type: ignore[attr-defined]

    # 89 an assignment to the progress
    show(trainer.progress.steps + 1)
    trainer.progress.steps += 1  # type: ignore[misc]

    # 90 an attribute of a mixin that is not composed
    show(Scheduled(net, loss_func=loss, optimizer=opt, create_scheduler=lambda o, plan: Warmup()).scheduler)
    show(trainer.scheduler)  # type: ignore[attr-defined]


# ==== checkpoints


class Saved(CheckpointMixin, Trainer): ...


saved = Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits", callbacks=[SaveBest("eval_loss")])

# 91 a callback that saves in a trainer without checkpoints
Trainer(net, loss_func=loss, optimizer=opt, callbacks=[RestoreBestWeights("eval_loss")])
Trainer(net, loss_func=loss, optimizer=opt, callbacks=[SaveBest("eval_loss")])  # type: ignore[list-item]

# 92 a step number instead of a path
saved.load_checkpoint("runs/digits/step-00000003")
saved.load_checkpoint(3)  # type: ignore[arg-type]

# 93 a missing directory
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits")
Saved(net, loss_func=loss, optimizer=opt)  # type: ignore[call-arg]


# ==== when to save and what to keep

# 94 a number without a unit
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits", checkpoint_every=Steps(500))
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits", checkpoint_every=500)  # type: ignore[arg-type]

# 95 the name of a value instead of a rule
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits", keep_best=Best("accuracy", mode="max"))
Saved(net, loss_func=loss, optimizer=opt, checkpoint_dir="runs/digits", keep_best="accuracy")  # type: ignore[arg-type]

# 96 an invalid mode of a rule
Best("accuracy", mode="max")
Best("accuracy", mode="maximum")  # type: ignore[arg-type]

# ==== refinements of a step


# 97 a mixin that mixes pairs, with a loop over other batches
class MixedPairs(MixUpMixin, Trainer): ...


class MixedTokens(MixUpMixin, TokenLoop): ...  # type: ignore[misc]


class Refines(BatchMixin[TokenBatch, Tensor]):
    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        return super().train_step(batch)


# 98 a part of the batch passed to the step
class RefinesPart(BatchMixin[TokenBatch, Tensor]):
    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        return super().train_step(batch.tokens)  # type: ignore[arg-type]


class Loads(Mixin):
    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        return super().make_train_dataloader(request)


# 99 the dataset passed to the hook that loads it
class LoadsDataset(Mixin):
    @override
    def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
        return super().make_train_dataloader(request.dataset)  # type: ignore[arg-type]


# ==== trainers passed to functions


def takes_pairs(trainer: TrainingLoop[Pair, Tensor, nn.Module, Pair]) -> None: ...


def takes_names(trainer: TrainingLoop[Pair, Tensor, nn.Module, str]) -> None: ...


def make_trainer() -> Trainer:
    return trainer


def passes_trainers() -> None:
    # 100 a trainer for other samples than the function's
    takes_pairs(trainer)
    takes_names(trainer)  # type: ignore[arg-type]

    # 101 an assertion on a dataset of other samples
    assert_split_invariant(make_trainer, data)
    assert_split_invariant(make_trainer, ["one", "two"])  # type: ignore[arg-type]


# ==== data of other libraries


class Names:
    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


class Numbers:
    def __iter__(self) -> Iterator[Pair]:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


def data_of_other_libraries() -> None:
    # 102 a stream of other samples
    trainer.evaluate(Numbers())
    trainer.evaluate(Names())  # type: ignore[arg-type]

    # 103 arrays with texts as targets
    trainer.evaluate([(np.zeros(4), 1)])
    trainer.evaluate([(np.zeros(4), "one")])  # type: ignore[list-item]

    # 104 a stream limited by its epochs alone
    trainer.train(Numbers(), max_steps=9)
    trainer.train(Numbers(), num_epochs=1)  # type: ignore[call-overload]


# ==== models of another class


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, 4)

    @override
    def forward(self, noise: Tensor, *, scale: float = 1.0) -> Tensor:
        fake: Tensor = scale * self.generator(noise)
        return fake


class GANLoop(AMPMixin, GradClipMixin, TrainingLoop[Tensor, Tensor, GAN]):
    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        fake = self.forward(batch)
        return StepOutput(loss=fake.mean(), outputs=fake)


class GANTrainer(SeedMixin, Trainer[GAN]): ...


# 105 another model than the loop's
GANLoop(GAN(), optimizer=opt)
GANLoop(net, optimizer=opt)  # type: ignore[arg-type]

# 106 another model than the composed trainer's
GANTrainer(GAN(), loss_func=loss, optimizer=opt)
GANTrainer(net, loss_func=loss, optimizer=opt)  # type: ignore[arg-type]

# 107 the model's class instead of a model
Trainer(GAN(), loss_func=loss, optimizer=opt)
Trainer(GAN, loss_func=loss, optimizer=opt)  # type: ignore[type-var]


# ==== the class of the model


# 108 the type of samples in the place of the model's class
class LabelLoop(TrainingLoop[Pair, Tensor, nn.Module, tuple[Tensor, int]]): ...


class WrongLabelLoop(TrainingLoop[Pair, Tensor, tuple[Tensor, int]]): ...  # type: ignore[type-var]


def show_gan(trainer: Trainer[GAN]) -> None: ...


class OnGAN(Callback[HasModel[GAN]]): ...


class LinearTrainer(SeedMixin, Trainer[nn.Linear]): ...


def functions_of_a_class_of_models() -> None:
    # 109 a trainer of another model than the function's
    show_gan(Trainer(GAN(), loss_func=loss, optimizer=opt))
    show_gan(trainer)  # type: ignore[arg-type]

    # 110 a callback for another model than the trainer's
    GANTrainer(GAN(), loss_func=loss, optimizer=opt, callbacks=[OnGAN()])
    LinearTrainer(net, loss_func=loss, optimizer=opt, callbacks=[OnGAN()])  # type: ignore[list-item]


# ==== what the model has


def what_the_model_has(loop: GANLoop, inferred: Trainer[GAN]) -> None:
    # 111 a misspelt submodule
    show(loop.model.generator)
    show(inferred.model.generatr.in_features)  # type: ignore[union-attr]

    # 112 a misspelt argument of the model's `forward`
    show(loop.forward(torch.zeros(2), scale=2.0))
    show(loop.forward(torch.zeros(2), scal=2.0))  # type: ignore[call-arg]

    # 113 outputs of the model used as another type
    show(loop.forward(torch.zeros(2)).mean())
    show(loop.forward(torch.zeros(2)).logits)  # type: ignore[attr-defined]


# ==== the model of a trainer


def the_model_of_a_trainer(loop: GANLoop, inferred: Trainer[GAN]) -> None:
    # 114 an input of another type
    show(loop.forward(torch.zeros(2)))
    show(inferred.forward("noise"))  # type: ignore[arg-type]

    # 115 another model, while the optimizer has the parameters of the first
    show(GANLoop(GAN(), optimizer=opt))
    loop.model = GAN()  # type: ignore[misc]


# ==== several updates per step


class Updates(MultiUpdateLoop[Tensor, Tensor, GAN]):
    @override
    def train_updates(self, batch: Tensor) -> Iterator[Update[Tensor]]:
        # 116 an update without a loss
        yield Update("generator", loss=self.model.generator(batch).mean())
        yield Update("generator")  # type: ignore[call-arg]

        # 117 outputs of another type
        yield Update("generator", loss=batch.mean(), outputs=batch)
        yield Update("generator", loss=batch.mean(), outputs="none")  # type: ignore[arg-type]


# ==== several optimizers


def several_optimizers() -> None:
    # 118 a mapping in the place of an OptimizerDict
    show(Trainer(net, loss_func=loss, optimizer=OptimizerDict({"muon": opt})))
    show(Trainer(net, loss_func=loss, optimizer={"muon": opt}))  # type: ignore[arg-type]


# ==== freezing


class Frozen(FreezeMixin, Trainer): ...


def freezing() -> None:
    # 119 a number in the place of a time
    show(Frozen(net, loss_func=loss, optimizer=opt, unfreeze_at={"0": Epochs(2)}))
    show(Frozen(net, loss_func=loss, optimizer=opt, unfreeze_at={"0": 2}))  # type: ignore[dict-item]


# ==== values


def cadence() -> None:
    # 120 a number in the place of a cadence
    show(Trainer(net, loss_func=loss, optimizer=opt, log_every=Steps(10)))
    show(Trainer(net, loss_func=loss, optimizer=opt, log_every=10))  # type: ignore[arg-type]


class LogsText(Callback[TrainerCore]):
    # 121 a text in the place of a number
    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        trainer.log({"loss_a": 0.5, "loss_b": torch.zeros(())})
        trainer.log({"text": "good"})  # type: ignore[dict-item]

    # 122 values that are read as another type
    @override
    def on_values(self, trainer: TrainerCore, values: dict[str, str], step: int) -> None: ...  # type: ignore[override]


# ==== a number of batches per step that changes


def accumulation() -> None:
    # 123 numbers in the place of times
    show(Accumulating(net, loss_func=loss, optimizer=opt, accumulation_schedule={Epochs(3): 4}))
    show(Accumulating(net, loss_func=loss, optimizer=opt, accumulation_schedule={3: 4}))  # type: ignore[arg-type]


# ==== items


def item_limits() -> None:
    # 124 a cadence instead of a number of items
    show(Trainer(net, loss_func=loss, optimizer=opt).train(data, max_items=500))
    show(Trainer(net, loss_func=loss, optimizer=opt).train(data, max_items=Items(500)))  # type: ignore[call-overload]


# ==== spikes


def spikes() -> None:
    # 125 an unknown action
    show(Mixed(net, loss_func=loss, optimizer=opt, max_loss_deviations=4.0, spike_action="skip"))
    show(Mixed(net, loss_func=loss, optimizer=opt, max_loss_deviations=4.0, spike_action="warn"))  # type: ignore[arg-type]
