"""Splitting the same work over real processes changes nothing but time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from typing_extensions import override

from ptacc import (
    Callback,
    GradAccumMixin,
    GradClipMixin,
    MetricsMixin,
    SeedMixin,
    StepOutput,
    StepResult,
    Trainer,
    TrainerCore,
    TrainingLoop,
)
from ptacc.protocols import DataLoaderKwargs
from ptacc.testing import tiny_data, tiny_parts
from tests.data.test_data import Backwards
from tests.ranks import run_ranks


class FullTrainer(SeedMixin, GradAccumMixin, GradClipMixin, MetricsMixin, Trainer):
    seed: int | None = 5
    max_grad_norm: float | None = 0.5


def train(per_device_batch_size: int, accumulation: int, samples: int) -> dict[str, list[float]]:
    metric = MulticlassAccuracy(2, average="micro").double()
    trainer = FullTrainer(
        **tiny_parts(),
        gradient_accumulation_steps=accumulation,
        metrics={"accuracy": metric},
        train_metrics={"accuracy": metric.clone()},
    )
    data = tiny_data(samples)
    history = trainer.train(data, tiny_data(13), num_epochs=2, per_device_batch_size=per_device_batch_size)
    return {
        "losses": [step.loss for step in history.steps],
        "norms": [step.logged["grad_norm"] for step in history.steps],
        "epochs": [value for epoch in history for value in epoch.values().values()],
        "weights": trainer.model.state_dict()["weight"].flatten().tolist(),
    }


@pytest.mark.parametrize("samples", [48, 41, 37])
def test_two_processes_and_accumulation_equal_one_batch(samples: int) -> None:
    whole = train(16, 1, samples)
    for split in (train(8, 2, samples), *run_ranks(train, 2, 8, 1, samples), *run_ranks(train, 2, 4, 2, samples)):
        for name, values in whole.items():
            assert split[name] == pytest.approx(values, rel=1e-12, abs=1e-14), name


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Sequences of unequal numbers of tokens. Those with a negative target are padding and do not count as items."""

    def __len__(self) -> int:
        return 22

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, 2, (6,), generator=generator)
        targets[index % 7 :] = -100
        return tokens, targets


class TokenLoop(SeedMixin, GradAccumMixin, TrainingLoop[tuple[Tensor, Tensor], Tensor]):
    seed: int | None = 5

    @override
    def count_items(self, batch: tuple[Tensor, Tensor]) -> int:
        return int((batch[1] != -100).sum())

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        logits = self.model(batch[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum")
        return StepOutput.from_sum(loss, outputs=logits, logged={"mean_logit": logits.mean()})


def train_tokens(per_device_batch_size: int, accumulation: int) -> list[float]:
    parts = tiny_parts()
    del parts["loss_func"]
    trainer = TokenLoop(**parts, gradient_accumulation_steps=accumulation)
    history = trainer.train(Tokens(), Tokens(), num_epochs=2, per_device_batch_size=per_device_batch_size)
    return [step.loss for step in history.steps] + [epoch.eval_loss or 0.0 for epoch in history]


def test_token_losses_are_means_over_tokens_however_they_are_split() -> None:
    whole = train_tokens(8, 1)
    for split in (
        train_tokens(4, 2),
        train_tokens(2, 4),
        *run_ranks(train_tokens, 2, 4, 1),
        *run_ranks(train_tokens, 2, 1, 4),
    ):
        assert split == pytest.approx(whole, rel=1e-12)


def evaluate_and_predict(make_data: Callable[[], Any], batch_size: int) -> tuple[float, float, list[float]]:
    class BatchNormed(MetricsMixin, Trainer): ...

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer = BatchNormed(**parts, metrics={"accuracy": MulticlassAccuracy(2, average="micro").double()})
    result = trainer.evaluate(make_data(), per_device_batch_size=batch_size)
    predictions = trainer.predict(make_data(), per_device_batch_size=batch_size)
    return result.loss, result.metrics["accuracy"], [float(output[0]) for output in predictions]


class TinyStream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, n: int) -> None:
        self.n = n

    @override
    def __iter__(self) -> Any:
        return iter([tiny_data(self.n)[i] for i in range(self.n)])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", [tiny_data, TinyStream])
def test_evaluation_and_prediction_see_every_sample_once(kind: Callable[[int], Any], world_size: int) -> None:
    for samples in (1, 2, 5, 13):
        loss, accuracy, outputs = evaluate_and_predict(lambda: tiny_data(samples), 3)  # noqa: B023
        for split in run_ranks(evaluate_and_predict, world_size, lambda: kind(samples), 3):  # noqa: B023
            assert split[:2] == pytest.approx((loss, accuracy), rel=1e-12)
            assert split[2] == pytest.approx(outputs, rel=1e-12)


def stop_on_rank_one() -> tuple[int, str | None]:
    class StopInStep5(Callback[TrainerCore]):
        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            if trainer.distributed.rank == 1 and step.step == 5:
                trainer.stop("stop of rank 1")

    trainer = Trainer(**tiny_parts(), callbacks=[StopInStep5()])
    history = trainer.train(tiny_data(), num_epochs=50, stop_check_every=4)
    return history[-1].step, history.stop_reason


def test_all_processes_stop_at_one_step_for_one_reason() -> None:
    results = run_ranks(stop_on_rank_one, 2)
    assert results[0] == results[1] == (6, "stop of rank 1")


def train_with_a_users_sampler() -> list[float]:
    seen: list[float] = []

    class Seeing(Trainer):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            seen.extend(batch[0][:, 0].tolist())
            return super().train_step(batch)

    kwargs: DataLoaderKwargs = {"sampler": Backwards(6)}
    Seeing(**tiny_parts()).train(tiny_data(6), num_epochs=1, per_device_batch_size=2, train_dataloader_kwargs=kwargs)
    return seen


def test_a_users_sampler_is_partitioned_in_its_order() -> None:
    first = tiny_data(6).tensors[0][:, 0].flip(0).tolist()
    ranks = run_ranks(train_with_a_users_sampler, 2)
    assert ranks[0] + ranks[1] == [*first[:2], first[4], *first[2:4], first[5]]


def train_already_sharded() -> tuple[float, int]:
    trainer = Trainer(**tiny_parts())
    data = TensorDataset(*(tensor[: 5 if trainer.distributed.rank == 0 else 17] for tensor in tiny_data(24).tensors))
    history = trainer.train(data, num_epochs=1, per_device_batch_size=4, data_is_sharded=True)
    return history[0].train_loss, int(history[0].items)


def test_data_that_is_already_sharded_is_padded() -> None:
    results = run_ranks(train_already_sharded, 2)
    assert results[0] == results[1]
    assert results[0][1] == 22


def test_a_stream_is_shared_by_the_processes() -> None:
    def train_stream() -> float:
        return Trainer(**tiny_parts()).train(TinyStream(13), max_steps=4, per_device_batch_size=2)[0].train_loss

    def train_alone() -> float:
        return Trainer(**tiny_parts()).train(TinyStream(13), max_steps=4, per_device_batch_size=4)[0].train_loss

    assert run_ranks(train_stream, 2) == [pytest.approx(train_alone(), rel=1e-12)] * 2


class Seen:
    """A metric in plain Python: the targets in the order of the updates, as one number."""

    def __init__(self) -> None:
        self.digits: list[int] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.digits += targets.tolist()

    def compute(self) -> dict[str, float]:
        return {"count": len(self.digits), "order": float("0." + "".join(map(str, self.digits)))}

    def reset(self) -> None:
        self.digits.clear()


class Measured(SeedMixin, MetricsMixin, Trainer):
    seed: int | None = 5


def measure_by_a_plain_object(per_device_batch_size: int) -> list[float]:
    trainer = Measured(**tiny_parts(), metrics={"seen": Seen()}, train_metrics={"seen": Seen()})
    history = trainer.train(tiny_data(13), tiny_data(11), num_epochs=2, per_device_batch_size=per_device_batch_size)
    return [value for epoch in history for values in (epoch.metrics, epoch.train_metrics) for value in values.values()]


def test_a_plain_metric_is_updated_with_the_samples_of_all_processes_in_order() -> None:
    whole = measure_by_a_plain_object(6)
    assert whole[0] == 11
    assert whole[2] == 13
    for split in (*run_ranks(measure_by_a_plain_object, 2, 3), *run_ranks(measure_by_a_plain_object, 3, 2)):
        assert split == whole


class Logging(Trainer):
    """Logs a value in some batches, on some ranks."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        is_logged = self._distributed.rank == 0 and self.progress.steps == 1
        return StepOutput(output.loss, output.outputs, logged={"aux": torch.tensor(3.0)} if is_logged else {})


def log_on_one_rank() -> list[dict[str, float]]:
    history = Logging(**tiny_parts()).train(tiny_data(12), num_epochs=1, per_device_batch_size=2)
    return [dict(step.logged) for step in history.steps]


def test_a_value_may_be_logged_on_some_ranks_and_steps_only() -> None:
    assert run_ranks(log_on_one_rank, 2) == [[{}, {"aux": 3.0}, {}]] * 2


class Curve(MetricsMixin, Trainer): ...


def area_under_the_curve(batch_size: int) -> list[float]:
    curve = MulticlassAUROC(2, thresholds=None)  # its state is a list of all batches
    trainer = Curve(**tiny_parts(), metrics={"auroc": curve, "accuracy": MulticlassAccuracy(2)})
    inputs, targets = tiny_data(24).tensors
    one_of_each = [int((targets == target).nonzero()[0]) for target in (0, 1)]
    data = TensorDataset(inputs[one_of_each], targets[one_of_each])
    return list(trainer.evaluate(data, per_device_batch_size=batch_size).metrics.values())


def test_a_metric_of_lists_is_right_where_a_process_has_no_sample() -> None:
    alone = area_under_the_curve(3)
    assert run_ranks(area_under_the_curve, 3, 1, timeout=30) == [pytest.approx(alone)] * 3


def log_means_of_tokens(per_device_batch_size: int) -> list[float]:
    class Sparse(TokenLoop):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            logits, is_token = self.model(batch[0]), batch[1] != -100
            losses = logits.square().mean(dim=2)[is_token]
            return StepOutput.from_sum(losses.sum(), outputs=logits, logged={"mean_loss": losses.mean()})

    parts = tiny_parts()
    del parts["loss_func"]
    data = [Tokens()[index] for index in (7, 1, 2, 0)]  # the first and the last have no tokens
    trainer = Sparse(**parts)
    options: Any = {"train_dataloader_kwargs": {"shuffle": False}, "per_device_batch_size": per_device_batch_size}
    return [step.logged["mean_loss"] for step in trainer.train(data, num_epochs=1, **options).steps]


def test_a_mean_over_a_batch_without_items_is_not_logged() -> None:
    assert run_ranks(log_means_of_tokens, 2, 1, timeout=30) == [pytest.approx(log_means_of_tokens(2), rel=1e-12)] * 2


def train_with_a_collate_function_that_drops(per_device_batch_size: int) -> list[float]:
    def drop_some(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        kept = [sample for sample in samples if sample[0][0] > -0.5]
        return torch.stack([x for x, _ in kept]), torch.stack([y for _, y in kept])

    loader = DataLoader(tiny_data(24), batch_size=per_device_batch_size, collate_fn=drop_some)
    return [step.loss for step in Trainer(**tiny_parts()).train(loader, num_epochs=1).steps]


def test_a_collate_function_may_drop_samples() -> None:
    whole = train_with_a_collate_function_that_drops(12)
    assert (
        run_ranks(train_with_a_collate_function_that_drops, 2, 6, timeout=30) == [pytest.approx(whole, rel=1e-12)] * 2
    )
