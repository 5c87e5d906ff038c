"""Invalid data, options, steps and launches raise an error that names them, and leave the model unchanged."""

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from typing_extensions import override

from ptacc import (
    AMPMixin,
    DataLoaderConfig,
    Epochs,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    Minutes,
    Monitor,
    Pair,
    PrintMetrics,
    ProgressBar,
    RestoreBestWeights,
    RunPlan,
    SeedMixin,
    StepOutput,
    Steps,
    StopOnNonFinite,
    Trainer,
    TrainerCore,
)
from ptacc import Callback as PtaccCallback
from ptacc.errors import (
    AcceleratorConflictError,
    CompositionError,
    DataError,
    LaunchError,
    LossError,
    ModelError,
    MonitorError,
    NestedRunError,
    OptionError,
    SchedulerError,
)
from tests.ranks import launch

Sample = tuple[Tensor, Tensor]
SAMPLES = [(torch.ones(2), torch.zeros(1)) for _ in range(10)]
DATA = TensorDataset(torch.ones(10, 2), torch.zeros(10, 1))


class Composed(AMPMixin, GradAccumMixin, GradClipMixin, MetricsMixin, SeedMixin, Trainer): ...


class Scheduled(LRSchedulerMixin, Trainer): ...


def make(cls: Callable[..., Trainer] = Trainer, model: nn.Module | None = None, **options: Any) -> Any:
    """Make a trainer, typed as Any, since type checkers would reject most of these tests."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5).eval()) if model is None else model
    if "optimizer" not in options:
        options["optimizer"] = SGD(model.parameters(), lr=0.1)
    return cls(model, **{"loss_func": mse_loss, "default_callbacks": (), **options})


@contextlib.contextmanager
def refused(trainer: Any, error: type[Exception], message: str, *, after_steps: bool = False) -> Generator[None]:
    """Expect an error in the block, and check that the trainer's model is unchanged after it."""
    model = trainer.model
    weights, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        yield
    assert trainer.model is model
    assert [module.training for module in model.modules()] == flags
    assert not trainer.is_running
    is_unchanged = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert after_steps or is_unchanged


def refuse_options(
    error: type[Exception], message: str, cls: Callable[..., Trainer] = Composed, **options: Any
) -> None:
    with pytest.raises(error, match=message):
        make(cls, **options)


# ---- data


class Claimed(Dataset[Sample]):
    """Ten samples, and a length that may be wrong."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    @override
    def __getitem__(self, index: int) -> Sample:
        return SAMPLES[index]


class ClaimedByKey(Claimed):
    @override
    def __getitem__(self, index: int) -> Sample:
        return dict(enumerate(SAMPLES))[index]


class Stream(IterableDataset[Sample]):
    @override
    def __iter__(self) -> Iterator[Sample]:
        return iter(SAMPLES)


class ClaimedStream(Stream):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No data was given: got None"),
        ([], "list is empty"),
        (Claimed(0), "Claimed is empty"),
        (3, "int is not a dataset: it needs __len__ and __getitem__"),
        ((sample for sample in SAMPLES), "generator is not a dataset"),
        ({"train": DATA}, "Got a mapping"),
        (SimpleNamespace(loader=DataLoader(DATA)), "SimpleNamespace wraps a DataLoader. Pass the DataLoader itself"),
        (ClaimedStream(0), "gives no batch: it is empty"),
    ],
)
def test_missing_or_inconsistent_data_is_refused(data: object, message: str) -> None:
    trainer = make()
    with refused(trainer, DataError, message):
        trainer.train(data, num_epochs=1)


@pytest.mark.parametrize(("data", "message"), [(None, "got None"), ([], "is empty"), ({}, "the mapping is empty")])
def test_missing_evaluation_data_is_refused(data: object, message: str) -> None:
    trainer = make()
    with refused(trainer, DataError, message):
        trainer.evaluate(data)
    if data is not None:
        with refused(trainer, DataError, message):
            trainer.train(DATA, data, num_epochs=1)


def test_an_empty_stream_is_refused() -> None:
    class Nothing(Stream):
        @override
        def __iter__(self) -> Iterator[Sample]:
            return iter(())

    trainer = make()
    with refused(trainer, DataError, "gave no batch in a whole epoch"):
        trainer.train(Nothing(), max_steps=1)
    with refused(trainer, DataError, "gave no batch"):
        trainer.evaluate(Nothing())


def test_evaluation_data_whose_targets_are_all_ignored_is_refused() -> None:
    trainer = make(loss_func=nn.CrossEntropyLoss(ignore_index=0))
    data = TensorDataset(torch.ones(10, 2), torch.zeros(10, dtype=torch.int64))
    with refused(trainer, DataError, "The evaluation data has no items at all: count_items gave 0 for each"):
        trainer.evaluate(data)
    with refused(trainer, DataError, "The evaluation data 'test' has no items at all"):
        trainer.evaluate({"test": data})


@pytest.mark.parametrize(("length", "gave"), [(100, "it gave 2"), (8, "it gave more")])
def test_a_stream_with_a_wrong_length_is_refused_when_it_ends(length: int, gave: str) -> None:
    trainer = make()
    with refused(trainer, DataError, rf"ClaimedStream said it has {length} samples.*{gave}", after_steps=True):
        trainer.train(ClaimedStream(length), num_epochs=1)


def test_a_stream_with_the_right_length_is_trained_on() -> None:
    assert make().train(ClaimedStream(10), num_epochs=2)[-1].step == 4


def test_a_stream_without_a_length_needs_max_steps_or_max_time() -> None:
    trainer = make()
    with refused(trainer, OptionError, r"train\(num_epochs=1\) on data without a length.*Give max_steps, max_items or"):
        trainer.train(Stream(), num_epochs=1)


def test_a_collate_function_that_returns_nothing_is_refused() -> None:
    trainer = make()
    with refused(trainer, DataError, "no batch in a whole epoch.* collate_fn ends in `return batch`"):
        trainer.train(DATA, num_epochs=1, collate_fn=lambda samples: None)
    with refused(trainer, OptionError, r"collate_fn=3\): must be a function"):
        trainer.train(DATA, num_epochs=1, collate_fn=3)


def test_drop_last_that_drops_everything_is_refused() -> None:
    trainer = make()
    with refused(trainer, DataError, "drop_last dropped the only one"):
        trainer.train(DATA, num_epochs=1, per_device_batch_size=64, train_dataloader_kwargs={"drop_last": True})
    with refused(trainer, DataError, "drop_last dropped the only one"):
        trainer.evaluate(DATA, per_device_batch_size=64, dataloader_kwargs={"drop_last": True})


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ([{"x": torch.ones(2)}], "a dict with the keys x"),
        ([torch.ones(2)], "a Tensor"),
        ([(torch.ones(2),) * 3], r"a tuple of \(Tensor, Tensor, Tensor\)"),
    ],
)
def test_a_batch_that_is_not_a_pair_is_refused(data: list[Any], given: str) -> None:
    trainer = make()
    with refused(trainer, DataError, rf"Trainer trains on batches \(inputs, targets\).*gives {given}"):
        trainer.train(data, num_epochs=1)
    with refused(trainer, DataError, given):
        trainer.evaluate(data)


# ---- loaders


def test_a_batch_size_with_a_batch_sampler_is_refused() -> None:
    trainer, batches = make(), BatchSampler(SequentialSampler(DATA), 2, drop_last=False)
    with refused(trainer, OptionError, "per_device_batch_size=4 with a batch_sampler"):
        trainer.train(DATA, num_epochs=1, per_device_batch_size=4, train_dataloader_kwargs={"batch_sampler": batches})


@pytest.mark.parametrize("options", [{"per_device_batch_size": 4}, {"collate_fn": list}])
def test_a_ready_loader_with_options_of_a_loader_is_refused(options: dict[str, Any]) -> None:
    trainer, message = make(), r"got a DataLoader together with per_device_batch_size.*Give the dataset instead"
    with refused(trainer, OptionError, message):
        trainer.train(DataLoader(DATA), num_epochs=1, **options)
    with refused(trainer, OptionError, message):
        trainer.evaluate({"test": DataLoader(DATA)}, **options)
    with refused(trainer, OptionError, message):
        trainer.predict(DataLoader(DATA), **options)


def test_unknown_keywords_are_refused_with_a_suggestion() -> None:
    trainer = make()
    with refused(trainer, TypeError, r"train\(\) has no keyword 'num_epoch'. Did you mean `num_epochs`"):
        trainer.train(DATA, num_epoch=1)
    with refused(trainer, TypeError, r"evaluate\(\) has no keyword 'batch_size'. Did you mean `per_device_batch_size`"):
        trainer.evaluate(DATA, batch_size=1)
    with refused(trainer, TypeError, r"predict\(\) has no keyword 'limit_batch'. Did you mean `limit_batches`"):
        trainer.predict(DATA, limit_batch=1)


def test_unknown_keywords_of_a_loader_are_refused() -> None:
    trainer = make()
    with refused(trainer, TypeError, "'num_worker'. Did you mean `num_workers`"):
        trainer.train(DATA, num_epochs=1, train_dataloader_kwargs={"num_worker": 2})
    with refused(trainer, TypeError, "The batch size is per_device_batch_size"):
        trainer.evaluate(DATA, dataloader_kwargs={"batch_size": 2})


def test_an_invalid_data_is_sharded_is_refused() -> None:
    trainer = make()
    with refused(trainer, OptionError, r"train\(data_is_sharded='none'\): must be True or False"):
        trainer.train(DATA, num_epochs=1, data_is_sharded="none")
    with refused(trainer, OptionError, r"evaluate\(data_is_sharded='none'\)"):
        trainer.evaluate(DATA, data_is_sharded="none")


def test_predictions_for_several_sets_are_refused() -> None:
    trainer = make()
    with refused(trainer, DataError, r"predict\(\) takes one dataset: got a mapping. Call it for each dataset"):
        trainer.predict({"one": DATA})


# ---- counts and times

COUNTS = ["num_epochs", "max_steps", "per_device_batch_size", "limit_batches", "stop_check_every"]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, math.nan, math.inf, "3"])
@pytest.mark.parametrize("name", COUNTS)
def test_an_invalid_count_is_refused(name: str, value: object) -> None:
    trainer = make()
    with refused(trainer, OptionError, rf"train\({name}={value!r}\): must be an integer of at least 1"):
        trainer.train(DATA, **{"num_epochs": 1, name: value})


@pytest.mark.parametrize("value", [0, -1.5, True, math.nan, math.inf, "3", timedelta(0), timedelta(seconds=-1)])
def test_an_invalid_time_is_refused(value: object) -> None:
    trainer = make()
    with refused(trainer, OptionError, r"train\(max_time=.*must be a finite number above 0"):
        trainer.train(DATA, max_time=value)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, math.nan, "3"])
@pytest.mark.parametrize("count", [Steps, Epochs])
def test_a_cadence_with_an_invalid_count_is_refused(count: Any, value: object) -> None:
    with pytest.raises(OptionError, match=rf"{count.__name__}\(n={value!r}\): must be an integer of at least 1"):
        count(value)


@pytest.mark.parametrize("value", [0, -1, True, math.nan, math.inf, "3"])
def test_invalid_minutes_are_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"Minutes\(n=.*must be a finite number above 0"):
        Minutes(value)


@pytest.mark.parametrize("value", [5, "epoch", None, Steps])
def test_a_value_that_is_not_a_cadence_is_refused(value: object) -> None:
    trainer = make()
    with refused(trainer, OptionError, r"evaluate_every=.*must be a cadence: Steps\(500\), Epochs\(1\), Minutes"):
        trainer.train(DATA, DATA, num_epochs=1, evaluate_every=value)


@pytest.mark.parametrize("value", [0, -1, True, math.nan, "1"])
def test_a_bar_with_an_invalid_interval_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=rf"ProgressBar\(refresh_seconds={value!r}\): must be a finite"):
        ProgressBar(refresh_seconds=value)


@pytest.mark.parametrize("value", ["step", 1, Steps(1)])
def test_a_table_with_other_rows_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"PrintMetrics\(every=.*must be one of 'epoch', 'evaluation', 'report'"):
        PrintMetrics(every=value)


def test_a_run_without_an_end_is_refused() -> None:
    trainer = make()
    with refused(trainer, OptionError, "does not know when to end: give num_epochs, max_steps, max_items or max_time"):
        trainer.train(DATA)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "2"])
def test_an_invalid_number_of_accumulation_steps_is_refused(value: object) -> None:
    refuse_options(
        OptionError, rf"gradient_accumulation_steps={value!r}\).*Leave it out", gradient_accumulation_steps=value
    )


@pytest.mark.parametrize("value", [math.nan, 0, 0.0, -1, True, "1"])
@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value"])
def test_an_invalid_clipping_limit_is_refused(name: str, value: Any) -> None:
    refuse_options(OptionError, rf"{name}={value!r}\): must be a finite number above 0. Leave it out", **{name: value})


def test_an_infinite_limit_is_refused_for_values_and_accepted_for_the_norm() -> None:
    refuse_options(OptionError, r"max_grad_value=inf\): must be a finite number", max_grad_value=math.inf)
    history = make(Composed, max_grad_norm=math.inf).train(DATA, num_epochs=1)
    assert history.steps[0].logged["grad_norm"] > 0


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", 2**70])
def test_an_invalid_seed_is_refused(value: object) -> None:
    refuse_options(OptionError, r"seed=.*must be a whole number from 0", seed=value)


# ---- models and optimizers


def test_an_optimizer_of_another_model_is_refused() -> None:
    trainer = make(optimizer=SGD(nn.Linear(2, 1).parameters(), lr=0.1))
    with refused(trainer, ModelError, r"2 of the optimizer's 2 parameters are not parameters of the model"):
        trainer.train(DATA, num_epochs=1)


def test_trainable_parameters_in_no_optimizer_are_warned_about() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    trainer = make(model=model, optimizer=SGD(model[1].parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"2 trainable parameters are in no optimizer.*0.weight, 0.bias") as caught:
        trainer.train(DATA, num_epochs=1)
    assert caught[0].filename == __file__


def test_a_model_with_nothing_to_train_is_refused() -> None:
    trainer = make(model=nn.Linear(2, 1).requires_grad_(False))
    with refused(trainer, ModelError, "nothing is trainable"):
        trainer.train(DATA, num_epochs=1)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = nn.Linear(2, 1)
    trainer = make(model=model, optimizer=LBFGS(model.parameters()))
    with refused(trainer, ModelError, r"LBFGS\.step\(\) requires a closure\. Add ClosureMixin"):
        trainer.train(DATA, num_epochs=1)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    trainer = make(model=wrap(nn.Linear(2, 1)))
    with refused(trainer, ModelError, "the model is already wrapped. Pass the original model"):
        trainer.train(DATA, num_epochs=1)
    with refused(trainer, ModelError, "the model is already wrapped"):
        trainer.evaluate(DATA)


def test_a_model_in_ddp_is_refused() -> None:
    code = """if True:
        import torch.distributed as dist
        from torch import nn
        from torch.optim import SGD
        from ptacc import Trainer
        from ptacc.errors import ModelError
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
        trainer = Trainer(model, loss_func=nn.MSELoss(), optimizer=SGD(model.parameters(), lr=0.1))
        try:
            trainer.train([], num_epochs=1)
        except ModelError as error:
            print(error)
        dist.destroy_process_group()
    """
    done = launch([sys.executable, "-c", code])
    assert "model=DistributedDataParallel(...)): the model is already wrapped" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 3, "optimizer": None}, r"model=3\): must be an instance of torch.nn.Module"),
        ({"model": nn.Linear, "optimizer": None}, "must be an instance of torch.nn.Module"),
        ({"optimizer": "sgd"}, r"optimizer='sgd'\): must be an instance of torch.optim.Optimizer, such as SGD"),
        ({"optimizer": SGD}, "must be an instance of torch.optim.Optimizer, such as SGD"),
        ({"loss_func": None}, r"must be a function of \(outputs, targets\)"),
        ({"loss_func": nn.MSELoss}, r"must be a function of \(outputs, targets\)"),
        ({"callbacks": [StopOnNonFinite]}, r"must be an instance, not a class: StopOnNonFinite\(...\)"),
        ({"callbacks": [print]}, "is not a callback. Derive its class from Callback"),
        ({"callbacks": StopOnNonFinite()}, r"must be a list of callbacks. Write `callbacks=\[...\]`"),
        ({"callbacks": None}, "must be a list of callbacks"),
    ],
)
def test_a_component_of_the_wrong_kind_is_refused(options: dict[str, Any], message: str) -> None:
    refuse_options(OptionError, message, **options)


# ---- schedules


def refuse_schedule(create: object, error: type[Exception], message: str, **options: Any) -> None:
    trainer = make(Scheduled, create_scheduler=create, **options)
    with refused(trainer, error, message):
        trainer.train(DATA, DATA, num_epochs=2)
    assert "initial_lr" not in trainer.optimizer.param_groups[0]


def test_a_schedule_of_another_optimizer_is_refused() -> None:
    other = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    refuse_schedule(lambda optimizer, plan: StepLR(other, 1), SchedulerError, "a StepLR for an optimizer other than")


def test_a_schedule_shorter_than_the_run_is_refused() -> None:
    def short(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=plan.steps_per_epoch)

    refuse_schedule(short, SchedulerError, r"OneCycleLR of 2 steps, and the run has 4 steps.*total_steps=plan")


def test_a_schedule_that_is_not_returned_is_refused() -> None:
    refuse_schedule(lambda optimizer, plan: None, SchedulerError, "create_scheduler returned NoneType")


def test_a_schedule_with_a_misspelt_monitor_is_refused() -> None:
    def plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer)

    message = r"scheduler_monitor='eval_los'\): no such value is reported. Did you mean `eval_loss`"
    refuse_schedule(plateau, MonitorError, message, scheduler_monitor="eval_los")


def test_a_schedule_instead_of_a_factory_is_refused() -> None:
    schedule = StepLR(SGD(nn.Linear(1, 1).parameters(), lr=0.1), 1)
    for given in (schedule, StepLR, None):
        refuse_options(OptionError, "must be a function that creates the scheduler", Scheduled, create_scheduler=given)
    refuse_options(
        OptionError, 'must be "step" or "epoch"', Scheduled, create_scheduler=len, scheduler_interval="batch"
    )


# ---- steps


def trainer_with_step(step: Callable[[Tensor], object]) -> type[Trainer]:
    class Mine(Trainer):
        @override
        def train_step(self, batch: Pair) -> Any:
            return step(self.model(batch[0]))

    return Mine


def output(loss: Any, **more: Any) -> StepOutput[None]:
    return StepOutput(loss=loss, outputs=None, **more)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda outputs: None, r"returned NoneType: it must return StepOutput\(loss=..., outputs=...\)"),
        (lambda outputs: outputs.mean(), "returned Tensor: it must return StepOutput"),
        (
            lambda outputs: output(outputs.mean().item()),
            r"the loss is of type float, and must be a scalar tensor.*Do not call .item\(\)",
        ),
        (lambda outputs: output(None), "the loss is of type NoneType.*Does the batch have the labels"),
        (output, r"the loss has the shape \(8, 1\), and must be a scalar"),
        (lambda outputs: output(outputs.mean().detach()), r"the loss has no gradient.*without .detach\(\)"),
        (lambda outputs: output(outputs.mean() * 1j), "the loss is torch.complex64"),
        (lambda outputs: output(outputs.mean().to("meta")), "the loss is on meta, and must be on"),
        (lambda outputs: output(outputs.mean(), logged={"norm": 1.0}), r"logged\['norm'\] is of type float"),
        (lambda outputs: output(outputs.mean(), logged={"norm": outputs}), r"logged\['norm'\] has the shape \(8, 1\)"),
    ],
)
def test_an_invalid_training_output_is_refused(step: Callable[[Tensor], object], message: str) -> None:
    trainer = make(trainer_with_step(step))
    with refused(trainer, LossError, rf"(?s)Mine.train_step.*{message}"):
        trainer.train(DATA, num_epochs=1)


def test_an_invalid_output_of_a_later_step_is_refused_too() -> None:
    outputs = iter([True, False])
    trainer = make(trainer_with_step(lambda predicted: output(predicted.mean()) if next(outputs) else None))
    with refused(
        trainer,
        LossError,
        "Mine.train_step returned NoneType.* To leave a batch out, return None from collate_fn",
        after_steps=True,
    ):
        trainer.train(DATA, num_epochs=1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "Mine.eval_step returned NoneType: it must return StepOutput"),
        (output(0.5), "the loss is of type float, and must be a scalar"),
        (output(torch.ones(3)), r"the loss has the shape \(3,\), and must be a scalar"),
    ],
)
def test_an_invalid_evaluation_output_is_refused(result: Any, message: str) -> None:
    class Mine(Trainer):
        @override
        def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
            return result  # type: ignore[no-any-return]

    trainer = make(Mine)
    with refused(trainer, LossError, message):
        trainer.evaluate(DATA)


# ---- metrics and monitors


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": MeanMetric()}, "every run reports a value of this name already"),
        ({"a/b": MeanMetric(), "a": MetricCollection({"b": SumMetric()})}, "two metrics report 'a/b'"),
        ([MeanMetric()], "must be a mapping from names to metrics"),
        (MeanMetric(), "must be a mapping from names to metrics"),
        ({"mean": MeanMetric}, r"metrics=\{'mean': MeanMetric\}\): must be a metric: an instance"),
        ({"mean": mse_loss}, "must be a metric: an instance, with update, compute and reset"),
    ],
)
def test_invalid_metrics_and_metrics_with_conflicting_names_are_refused(metrics: object, message: str) -> None:
    refuse_options(OptionError, message, metrics=metrics)


def test_a_metric_used_twice_is_refused() -> None:
    metric = MeanMetric()
    message = r"one MeanMetric is given twice.*metric.clone\(\)"
    refuse_options(OptionError, message, metrics={"mean": metric}, train_metrics={"mean": metric})
    refuse_options(OptionError, message, metrics={"first": metric, "second": metric})
    refuse_options(OptionError, message, metrics={"mean": metric, "half": metric * 0.5})
    refuse_options(
        OptionError, message, metrics={"all": MetricCollection({"mean": metric})}, train_metrics={"m": metric}
    )
    make(Composed, metrics={"ratio": metric / (metric + 1.0)}, train_metrics={"mean": metric.clone()})


def test_a_metric_with_the_name_of_a_training_value_is_refused() -> None:
    trainer = make(Composed, metrics={"grad_norm": MeanMetric()}, max_grad_norm=1.0)
    with refused(trainer, OptionError, "two values would be reported as 'grad_norm'"):
        trainer.train(DATA, DATA, num_epochs=1)


def test_an_evaluation_set_with_the_name_of_training_metrics_is_refused() -> None:
    trainer = make(Composed, train_metrics={"loss": SumMetric()})
    with refused(trainer, OptionError, "two values would be reported as 'train/loss'"):
        trainer.train(DATA, {"train": DATA}, num_epochs=1)


def test_a_misspelt_monitor_is_refused_with_the_reported_names() -> None:
    trainer = make(Composed, metrics={"accuracy": MeanMetric()}, callbacks=[RestoreBestWeights("acuracy")])
    with refused(
        trainer, MonitorError, r"monitor='acuracy'.*Did you mean `accuracy`.*Reported values: accuracy, eval_loss,"
    ):
        trainer.train(DATA, DATA, num_epochs=1)


def test_a_monitor_without_an_evaluation_is_refused() -> None:
    trainer = make(callbacks=[RestoreBestWeights("eval_loss")])
    with refused(trainer, MonitorError, "No eval_dataset was given"):
        trainer.train(DATA, num_epochs=1)


def test_an_invalid_mode_is_refused() -> None:
    with pytest.raises(OptionError, match=r"Monitor\('accuracy', mode='maximum'\): must be \"min\" or \"max\""):
        Monitor("accuracy", mode="maximum")  # type: ignore[arg-type]


# ---- the launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, fp16 is fp16")
def test_fp16_on_a_cpu_is_refused_and_leaves_no_trace() -> None:
    trainer = make(Composed, mixed_precision="fp16")
    with refused(trainer, OptionError, r"\"fp16\" on a CPU: Accelerate would silently train in fp32"):
        trainer.train(DATA, num_epochs=1)
    with refused(trainer, OptionError, r"\"fp16\" on a CPU"):
        trainer.evaluate(DATA)
    assert make().train(DATA, num_epochs=1)[-1].step == 2


def test_an_invalid_precision_is_refused() -> None:
    refuse_options(
        OptionError, r"mixed_precision='bf61'\): must be one of 'no', 'fp16', 'bf16'", mixed_precision="bf61"
    )


def test_a_world_size_without_a_process_group_is_refused() -> None:
    code = """if True:
        from torch import nn
        from torch.optim import SGD
        from ptacc import Trainer
        from ptacc.errors import LaunchError
        model = nn.Linear(2, 1)
        trainer = Trainer(model, loss_func=nn.MSELoss(), optimizer=SGD(model.parameters(), lr=0.1))
        try:
            trainer.train([], num_epochs=1)
        except LaunchError as error:
            print(error)
    """
    done = launch([sys.executable, "-c", code], env={"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""})
    assert "WORLD_SIZE=2, and Accelerate sees 1 process" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "needed"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "GradAccumMixin"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeedMixin"),
        ("ACCELERATE_USE_FSDP", "true", "FSDPMixin"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "CompileMixin"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "no mixin of ptacc"),
    ],
)
def test_a_launch_setting_that_no_mixin_supports_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, needed: str
) -> None:
    monkeypatch.setenv(variable, value)
    trainer = make()
    with refused(trainer, LaunchError, rf"The launch set {variable}={value}.*it needs {needed}"):
        trainer.train(DATA, num_epochs=1)


def test_launch_settings_that_are_off_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert make().train(DATA, num_epochs=1)[-1].step == 2


def test_a_launch_and_an_option_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    trainer = make(Composed, gradient_accumulation_steps=2)
    with refused(trainer, LaunchError, r"=4, and Composed has gradient_accumulation_steps=2. Give both the same"):
        trainer.train(DATA, num_epochs=1)


def test_a_second_precision_is_refused_during_a_run_with_the_first() -> None:
    class Second(PtaccCallback[Trainer]):
        @override
        def on_run_start(self, trainer: Trainer) -> None:
            make().evaluate(DATA)

    first = make(Composed, mixed_precision="bf16", callbacks=[Second()])
    message = r"Trainer needs an accelerator with default settings, .* Composed is using it for a run"
    with refused(first, AcceleratorConflictError, message):
        first.train(DATA, num_epochs=1)
    assert make().train(DATA, num_epochs=1)[-1].step == 2


# ---- a run within a run


def test_a_run_within_a_run_is_refused_in_a_callback() -> None:
    class Again(PtaccCallback[Trainer]):
        @override
        def on_run_start(self, trainer: Trainer) -> None:
            trainer.train(SAMPLES, num_epochs=1)

    trainer = make(callbacks=[Again()])
    with refused(trainer, NestedRunError, r"Trainer.train\(\) was called within its own run"):
        trainer.train(DATA, num_epochs=1)


@pytest.mark.parametrize("name", ["on_run_start", "on_evaluation_start"])
def test_a_run_within_a_run_or_an_evaluation_is_refused_in_a_hook(name: str) -> None:
    def hook(self: Any, *args: object) -> None:
        getattr(super(Again, self), name)(*args)
        self.train(DATA, num_epochs=1)

    Again = type("Again", (Trainer,), {name: hook})  # noqa: N806
    trainer = make(Again)
    with refused(trainer, NestedRunError, "Again.train"):
        trainer.train(DATA, num_epochs=1) if name == "on_run_start" else trainer.evaluate(DATA)


def test_a_run_within_the_set_up_of_a_run_is_refused() -> None:
    class Again(Trainer):
        @override
        def make_train_dataloader(self, request: DataLoaderConfig) -> DataLoader[object]:
            self.train(SAMPLES, num_epochs=1)
            return super().make_train_dataloader(request)

    trainer = make(Again)
    with refused(trainer, NestedRunError, "Again.train"):
        trainer.train(DATA, num_epochs=1)


def test_a_run_after_a_failed_run_is_accepted() -> None:
    fail = iter([True])

    class FailsOnce(PtaccCallback[TrainerCore]):
        @override
        def on_run_start(self, trainer: TrainerCore) -> None:
            if next(fail, False):
                raise CompositionError("a failure")

    trainer = make(callbacks=[FailsOnce()])
    with refused(trainer, CompositionError, "a failure"):
        trainer.train(DATA, num_epochs=1)
    assert trainer.train(DATA, num_epochs=1)[-1].step == 2
