"""fp16 with a real gradient scaler, on the CPU: steps that it skips are not counted."""

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import EMAMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, Mixin, StepOutput, StepResult, Trainer
from ptacc.engines.base import OptimizerSlot
from ptacc.engines.default import TorchEngine, step_scaled
from ptacc.errors import LossError
from ptacc.mixins.ema import EMA_STATE
from ptacc.protocols import DataLoaderKwargs, Engine

TOO_LARGE = 2.0**30
"""A scale at which fp16 gradients overflow, so that the first steps are skipped while it is halved."""
EPOCHS, BATCH, ACCUMULATION = 8, 8, 2


class ScalerOnTheHost(Mixin):
    """Does on a CPU what Accelerate does on a GPU: autocast to fp16 and a gradient scaler."""

    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE)
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), scaler)


class Scaled(ScalerOnTheHost, GradAccumMixin, GradClipMixin, LRSchedulerMixin, EMAMixin, Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        with torch.autocast("cpu", torch.float16):
            return super().train_step(batch)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        ended.append(step.step)


ended: list[int] = []


def make_parts(*, fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    if fused:  # not SGD: its fused form begins with unset momenta if its first step is skipped
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True), data
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data


def train(*, fused: bool = False, max_steps: int | None = None) -> Scaled:
    ended.clear()
    model, optimizer, data = make_parts(fused=fused)
    trainer = Scaled(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=0.5,
        ema_decay=0.9,
        create_scheduler=lambda optimizer, plan: StepLR(optimizer, 1, gamma=0.9),
        default_callbacks=(),
    )
    kwargs: DataLoaderKwargs = {"shuffle": False}
    if max_steps is not None:
        trainer.train(data, max_steps=max_steps, per_device_batch_size=BATCH, train_dataloader_kwargs=kwargs)
    else:
        trainer.train(data, num_epochs=EPOCHS, per_device_batch_size=BATCH, train_dataloader_kwargs=kwargs)
    return trainer


def train_plainly(*, fused: bool = False) -> tuple[nn.Module, int, float]:
    """Train as the documentation of torch does; return the model, the steps that happened and the last rate."""
    model, optimizer, data = make_parts(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE)
    scheduler = StepLR(optimizer, 1, gamma=0.9)
    happened = 0
    for _ in range(EPOCHS):
        for start in range(0, len(data), BATCH * ACCUMULATION):
            for part in range(ACCUMULATION):
                inputs, targets = data[start + part * BATCH : start + (part + 1) * BATCH]
                with torch.autocast("cpu", torch.float16):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                scaler.scale(loss / ACCUMULATION).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.5)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= before:
                happened += 1
                scheduler.step()
    return model, happened, float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("fused", [False, True])
def test_weights_equal_a_plain_loops_to_the_last_bit(fused: bool) -> None:
    trainer, (model, happened, _) = train(fused=fused), train_plainly(fused=fused)
    assert 0 < happened < EPOCHS * 2
    assert trainer.progress.steps == happened
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_not_counted(fused: bool) -> None:
    trainer, (_, happened, rate) = train(fused=fused), train_plainly(fused=fused)
    assert ended == list(range(1, happened + 1))
    assert trainer.run[EMA_STATE].updates == happened
    assert [step.step for step in trainer.history.steps] == ended
    assert trainer.history.steps[-1].learning_rate * 0.9 == rate
    assert trainer.progress.epochs == EPOCHS


def test_max_steps_does_not_count_skipped_steps() -> None:
    assert train(max_steps=5).progress.steps == 5


def test_non_finite_gradients_end_the_run() -> None:
    class NeverFinite(ScalerOnTheHost, Trainer):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            outputs: Tensor = self.model(batch[0])
            return StepOutput(loss=outputs.sum() * float("nan"), outputs=outputs)

    model, optimizer, data = make_parts()
    trainer = NeverFinite(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, default_callbacks=())
    with pytest.raises(LossError, match="200 steps in a row were skipped"):
        trainer.train(data, max_steps=5)
    assert trainer.progress.skipped == 200


def test_the_norm_is_that_of_the_unscaled_gradients() -> None:
    assert all(step.logged["grad_norm"] < 10 for step in train().history.steps)


def step_plainly(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def count_reads(step: Callable[[torch.amp.GradScaler, torch.optim.Optimizer], object], loss: float) -> int:
    """Return how often a step reads a number from a tensor, of a loss that is finite or not."""
    weight = nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(weight * loss).backward()  # type: ignore[no-untyped-call]
    with torch.profiler.profile() as profile:
        step(scaler, optimizer)
    return sum(event.name == "aten::_local_scalar_dense" for event in profile.events() or ())


@pytest.mark.parametrize("loss", [1.0, float("inf")])
def test_whether_a_step_happened_costs_no_further_read(loss: float) -> None:
    def step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        engine = TorchEngine(Accelerator(cpu=True), nn.Linear(1, 1), [OptimizerSlot("optimizer", optimizer)], scaler)
        assert engine.update() is (loss == 1.0)

    assert count_reads(step, loss) == count_reads(step_plainly, loss) > 0


def test_the_optimizer_has_a_hook_during_the_step_only() -> None:
    model, optimizer, _ = make_parts()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    assert step_scaled(scaler, optimizer)
    assert not vars(optimizer)["_optimizer_step_post_hooks"]


def test_each_run_begins_with_the_same_factor() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE)
    for _ in range(2):
        model, optimizer, _ = make_parts()
        engine = TorchEngine(accelerator, model, [OptimizerSlot("optimizer", optimizer)])
        engine.backward(model(torch.full((1, 4), torch.inf)).sum())
        assert not engine.update()
        assert engine.get_state().shared["scaler"]["scale"] == TOO_LARGE / 2
