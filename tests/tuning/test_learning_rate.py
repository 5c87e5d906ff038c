"""The search for a learning rate pairs each loss with its rate, suggests one that trains, and leaves no trace."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from typing_extensions import TypeVar, override

import ptacc
from ptacc import (
    AMPMixin,
    Best,
    CheckpointMixin,
    DeepSpeedMixin,
    EarlyStoppingMixin,
    EMAMixin,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    Mixin,
    RunPlan,
    SeedMixin,
    StepOutput,
    SWAMixin,
    Trainer,
)
from ptacc.engines.default import TorchEngine
from ptacc.errors import ModelError, OptionError
from ptacc.protocols import Engine
from ptacc.testing import iris, iris_parts, tiny_data, tiny_parts
from ptacc.testing.laws import make_options
from ptacc.tuning import LearningRateSearch, find_learning_rate
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

TestT = TypeVar("TestT", bound=Callable[..., None])
MIXINS = [
    value
    for value in vars(ptacc).values()
    if isinstance(value, type) and issubclass(value, Mixin) and value.__name__ not in {"Mixin", "BatchMixin"}
]


def in_deepspeed(test: TestT) -> TestT:
    return functools.reduce(lambda marked, mark: mark(marked), DEEPSPEED, test)


class Drawing(nn.Module):
    """Draws random numbers in its forward, and keeps state in buffers of both kinds and in extra state."""

    count: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        self.count += 1
        self.seen = self.seen + inputs.mean(dim=0)
        outputs: Tensor = self.body(inputs)
        return outputs

    @override
    def get_extra_state(self) -> int:
        return self.calls

    @override
    def set_extra_state(self, state: int) -> None:
        self.calls = state


class Everything(
    SeedMixin,
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    EMAMixin,
    SWAMixin,
    EarlyStoppingMixin,
    CheckpointMixin,
    Trainer,
): ...


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=plan.total_steps)


def make_everything(folder: Path, make_optimizer: Callable[..., Optimizer]) -> Everything:
    torch.manual_seed(3)
    model = Drawing()
    return Everything(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model.parameters(), lr=0.01),
        default_callbacks=(),
        seed=5,
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        create_scheduler=one_cycle,
        ema_decay=0.9,
        swa_start=1,
        checkpoint_dir=folder,
        resume=True,
        keep_best=Best("eval_loss"),
    )


def copy_state(trainer: Trainer) -> list[object]:
    """Return all that a search could change, as text with every digit."""
    torch.set_printoptions(precision=17, threshold=10_000)  # type: ignore[no-untyped-call]  # torch leaves it so
    model = trainer.model
    return [
        str(value)
        for value in (
            model.state_dict(),
            list(model.named_buffers()),
            [parameter.grad for parameter in model.parameters()],
            [module.training for module in model.modules()],
            trainer.optimizer.state_dict(),
            torch.get_rng_state().tolist(),
        )
    ]


# ---- it leaves no trace: see also test_isolated


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_run_after_a_search_equals_one_without_it_to_the_last_bit(
    tmp_path: Path, make_optimizer: Callable[..., Optimizer]
) -> None:
    ends = []
    for searches in (False, True):
        trainer = make_everything(tmp_path / str(searches), make_optimizer)
        if searches:
            find_learning_rate(trainer, iris(), steps=30, per_device_batch_size=16)
        history = trainer.train(iris(), iris(), num_epochs=3, per_device_batch_size=16)
        ends.append((copy_state(trainer), history.steps, [epoch.eval_loss for epoch in history]))
    assert ends[0] == ends[1]


def test_nothing_has_changed_after_a_search_between_two_runs(tmp_path: Path) -> None:
    trainer = make_everything(tmp_path, torch.optim.Adam)
    trainer.train(iris(), iris(), num_epochs=1)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, files, run = copy_state(trainer), sorted(tmp_path.rglob("*")), trainer.run
    find_learning_rate(trainer, iris(), steps=20)
    assert (copy_state(trainer), sorted(tmp_path.rglob("*")), trainer.run) == (before, files, run)


def test_a_search_that_fails_leaves_no_trace_either() -> None:
    parts: dict[str, Any] = iris_parts()
    cross_entropy, calls = parts["loss_func"], itertools.count()

    def fails_later(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 7:
            raise ZeroDivisionError
        loss: Tensor = cross_entropy(outputs, targets)
        return loss

    parts["loss_func"] = fails_later
    trainer = Trainer(**parts)
    before = copy_state(trainer)
    with pytest.raises(ZeroDivisionError):
        find_learning_rate(trainer, iris())
    assert copy_state(trainer) == before
    assert not trainer.has_run


@pytest.mark.parametrize("mixin", MIXINS)
def test_with_any_mixin_a_search_leaves_no_trace(
    mixin: type[Mixin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kind: Any = type("Composed", (mixin, Trainer), {})
    options = make_options(mixin)
    trainer: Trainer = kind(**tiny_parts(), **options)
    before = copy_state(trainer)
    search = find_learning_rate(trainer, tiny_data(), steps=20)
    assert search.suggestion is not None
    assert copy_state(trainer) == before
    assert (list(tmp_path.iterdir()), *capsys.readouterr()) == ([], "", "")
    if "checkpoint_dir" in options:
        assert list(Path(options["checkpoint_dir"]).iterdir()) == []


def test_samplers_keep_their_position() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(iris(), True, 100, generator)
    loader: DataLoader[object] = DataLoader(iris(), batch_size=16, sampler=sampler)
    before = generator.get_state()
    find_learning_rate(Trainer(**iris_parts()), loader, steps=10)
    find_learning_rate(Trainer(**iris_parts()), iris(), steps=10, train_dataloader_kwargs={"sampler": sampler})
    assert torch.equal(generator.get_state(), before)
    assert list(sampler) != list(sampler)


def test_a_rate_in_a_tensor_stays_that_tensor() -> None:
    parts: dict[str, Any] = iris_parts()
    rate = torch.tensor(0.05)
    parts["optimizer"] = torch.optim.Adam(parts["model"].parameters(), lr=rate, foreach=False)
    find_learning_rate(Trainer(**parts), iris(), steps=10)
    assert parts["optimizer"].param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)


# ---- results


def in_two_groups(model: nn.Module) -> Optimizer:
    first, second = (list(model.get_submodule(name).parameters()) for name in ("0", "2"))
    return torch.optim.SGD([{"params": first, "lr": 0.2}, {"params": second, "lr": 0.02}], momentum=0.9)


def plain_search(steps: int) -> list[float]:
    """Return the losses of a plain loop over iris in order, in batches of 50, with rates from 0.01 to 1."""
    parts: dict[str, Any] = iris_parts()
    model, loss_func = parts["model"], parts["loss_func"]
    optimizer = in_two_groups(model)
    losses = []
    for step in range(steps + 1):
        start = step % 3 * 50
        inputs, targets = iris()[start : start + 50]
        loss = loss_func(model(inputs), targets)
        losses.append(loss.item())
        rate = 0.01 * 100 ** (step / (steps - 1))
        for group, share in zip(optimizer.param_groups, (1.0, 0.1), strict=True):
            group["lr"] = rate * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[1:]


class Scheduled(LRSchedulerMixin, Trainer): ...


@pytest.mark.parametrize("kind", [Trainer, Scheduled])
def test_each_rate_has_the_loss_after_its_step_and_groups_keep_their_ratios(kind: Any) -> None:
    parts: dict[str, Any] = iris_parts()
    parts["optimizer"] = in_two_groups(parts["model"])
    schedule: dict[str, Any] = {"create_scheduler": one_cycle} if kind is Scheduled else {}
    search = find_learning_rate(
        kind(**parts, **schedule),
        iris(),
        min_lr=0.01,
        max_lr=1.0,
        steps=12,
        max_rise=100.0,
        per_device_batch_size=50,
        train_dataloader_kwargs={"shuffle": False},
    )
    assert search.losses == pytest.approx(plain_search(12), rel=1e-6)
    assert search.rates == pytest.approx([0.01 * 100 ** (i / 11) for i in range(12)])
    assert search.stopped is None


def test_the_suggestion_trains_far_better_than_rates_far_from_it() -> None:
    suggestion = find_learning_rate(Trainer(**iris_parts()), iris(), per_device_batch_size=16).suggestion
    assert suggestion is not None

    def end_of_training(rate: float) -> float:
        parts: dict[str, Any] = iris_parts()
        parts["optimizer"].param_groups[0]["lr"] = rate
        losses = [epoch.train_loss for epoch in Trainer(**parts).train(iris(), num_epochs=5)]
        return losses[-1]

    assert end_of_training(suggestion) < 0.5 * min(end_of_training(suggestion / 100), end_of_training(suggestion * 100))


def test_two_searches_find_the_same() -> None:
    parts: dict[str, Any] = iris_parts()
    parts["model"].append(nn.Dropout(0.1))
    trainer = Trainer(**parts)
    assert find_learning_rate(trainer, iris(), steps=20) == find_learning_rate(trainer, iris(), steps=20)


def test_diverging_losses_end_the_search() -> None:
    search = find_learning_rate(Trainer(**iris_parts()), iris(), max_lr=1e4, per_device_batch_size=16)
    assert search.stopped is not None
    assert search.rates[-1] < 1e3
    assert "after a step with" in search.stopped


def test_a_nan_loss_ends_the_search() -> None:
    data = TensorDataset(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.int64))
    search = find_learning_rate(Trainer(**iris_parts()), data)
    assert search == LearningRateSearch((), (), "the loss is nan before the first step")
    assert search.suggestion is None


def test_a_loss_below_zero_does_not_end_the_search() -> None:
    parts: dict[str, Any] = iris_parts()
    cross_entropy = parts["loss_func"]
    parts["loss_func"] = lambda outputs, targets: cross_entropy(outputs, targets) - 2
    shifted = find_learning_rate(Trainer(**parts), iris(), max_lr=0.5, per_device_batch_size=16)
    plain = find_learning_rate(Trainer(**iris_parts()), iris(), max_lr=0.5, per_device_batch_size=16)
    assert shifted.stopped is None
    assert shifted.suggestion == plain.suggestion


def test_nothing_is_suggested_if_the_loss_is_noise() -> None:
    parts: dict[str, Any] = iris_parts()
    parts["loss_func"] = lambda outputs, targets: outputs.mean() * 0 + torch.randn(())
    search = find_learning_rate(Trainer(**parts), iris(), max_rise=100.0)
    assert len(search.losses) == 100
    assert search.suggestion is None
    with pytest.raises(OptionError, match="suggests no learning rate"):
        search.set_rate(parts["optimizer"])


class Scaling(Trainer):
    """Trains with a real gradient scaler, whose initial scale is too large for float16: the first steps are skipped."""

    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), scaler)

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        with torch.autocast("cpu", torch.float16):
            return super().train_step(batch)


def test_steps_that_a_scaler_skips_are_repeated() -> None:
    search = find_learning_rate(Scaling(**iris_parts()), iris(), steps=12, max_lr=0.1, per_device_batch_size=16)
    assert (len(search.rates), len(search.losses), search.stopped) == (12, 12, None)


def test_a_nan_loss_ends_a_search_in_which_a_scaler_skips_every_step() -> None:
    data = TensorDataset(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.int64))
    assert find_learning_rate(Scaling(**iris_parts()), data).stopped == "the loss is nan before the first step"


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = iris().tensors
        yield from zip(inputs, targets, strict=True)


def test_streams_are_accepted() -> None:
    assert find_learning_rate(Trainer(**iris_parts()), Stream(), steps=10).stopped is None


def test_setting_the_rate_keeps_the_ratios_of_groups() -> None:
    parts: dict[str, Any] = iris_parts()
    optimizer = in_two_groups(parts["model"])
    search = find_learning_rate(Trainer(**parts), iris(), per_device_batch_size=16)
    search.set_rate(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([search.suggestion, 0.1 * (search.suggestion or 0)])


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    search = find_learning_rate(Trainer(**iris_parts()), iris(), steps=20)
    search.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---- several processes


def search_on_rank(folder: Path) -> tuple[LearningRateSearch, bool]:
    trainer = make_everything(folder, torch.optim.SGD)
    before = copy_state(trainer)
    search_options: dict[str, Any] = {"steps": 20, "min_lr": 1e-3, "max_lr": 1.0, "per_device_batch_size": 8}
    search = find_learning_rate(trainer, iris(), **search_options)
    is_as_before = copy_state(trainer) == before
    trainer.train(iris(), iris(), num_epochs=1)
    return search, is_as_before


def test_processes_find_the_same_and_keep_their_state(tmp_path: Path) -> None:
    (first, is_first), (second, is_second) = run_ranks(search_on_rank, 2, tmp_path)
    assert first == second
    assert is_first
    assert is_second


def search_with_batch_size(size: int) -> LearningRateSearch:
    trainer = Trainer(**tiny_parts())
    return find_learning_rate(trainer, tiny_data(), steps=15, max_lr=1.0, per_device_batch_size=size)


def test_the_loss_is_that_of_all_processes() -> None:
    (single,) = run_ranks(search_with_batch_size, 1, 8)
    first, _ = run_ranks(search_with_batch_size, 2, 4)
    assert first.losses == pytest.approx(single.losses, rel=1e-12)


def test_processes_stop_together_if_the_loss_diverges() -> None:
    def worker() -> LearningRateSearch:
        return find_learning_rate(Trainer(**iris_parts()), iris(), max_lr=1e4, per_device_batch_size=8)

    first, second = run_ranks(worker, 2)
    assert first == second
    assert first.stopped is not None


class Sharded(FSDPMixin, Trainer): ...


class Deep(DeepSpeedMixin, Trainer): ...


def search_in_shards(kind: Any, options: dict[str, Any]) -> tuple[LearningRateSearch, bool]:
    parts = iris_parts()
    parts["optimizer"] = torch.optim.Adam(parts["model"].parameters())
    trainer: Trainer = kind(**parts, **options)
    trainer.train(iris(), num_epochs=1, per_device_batch_size=8)
    before = copy_state(trainer)
    search = find_learning_rate(trainer, iris(), steps=15, max_lr=0.1, per_device_batch_size=8)
    return search, copy_state(trainer) == before


def check_shards(kind: type[Trainer], options: dict[str, Any]) -> None:
    (first, is_first), (second, is_second) = run_ranks(search_in_shards, 2, kind, options)
    assert first == second
    assert first.stopped is None
    assert is_first
    assert is_second


def test_an_fsdp_model_is_unsharded_and_unchanged_after_a_search() -> None:
    check_shards(Sharded, {})


@in_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_zero_model_is_plain_and_unchanged_after_a_search(stage: int) -> None:
    check_shards(Deep, {"zero_stage": stage})


# ---- invalid arguments


@pytest.mark.parametrize(
    "options", [{"steps": 9}, {"min_lr": 0.0}, {"max_lr": float("nan")}, {"max_rise": -1.0}, {"max_lr": 1e-8}]
)
def test_numbers_out_of_range_are_invalid(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"find_learning_rate.{name}="):
        find_learning_rate(Trainer(**iris_parts()), iris(), **options)


def test_a_first_group_without_a_rate_is_invalid() -> None:
    parts: dict[str, Any] = iris_parts()
    parts["optimizer"].param_groups[0]["lr"] = 0.0
    with pytest.raises(ModelError, match="first has to be above 0"):
        find_learning_rate(Trainer(**parts), iris())


def test_options_of_the_trainer_are_unchanged(tmp_path: Path) -> None:
    trainer = make_everything(tmp_path, torch.optim.SGD)
    before = copy.copy(vars(trainer))
    find_learning_rate(trainer, iris(), steps=10)
    assert vars(trainer) == before
