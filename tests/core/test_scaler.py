"""The path of fp16, with a real gradient scaler on the CPU: steps that it skips count nowhere."""

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    DataLoaderKwargs,
    EMAMixin,
    Engine,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    Mixin,
    StepOutput,
    StepResult,
    Trainer,
)
from ptacc.core.engine import TorchEngine
from ptacc.mixins.ema import EMA_STATE

TOO_LARGE = 2.0**30
"""A factor at which gradients in fp16 overflow, so that the first steps are skipped until it is halved enough."""
EPOCHS, BATCH, ACCUMULATION = 8, 8, 2


class HalfOnTheHost(Mixin):
    """What Accelerate does on a GPU, on a CPU: autocast to fp16 and a gradient scaler."""

    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE)
        return TorchEngine(self.accelerator, self.unwrapped_model, self.slots(), scaler)


class Scaled(HalfOnTheHost, GradAccumMixin, GradClipMixin, LRSchedulerMixin, EMAMixin, Trainer):
    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        with torch.autocast("cpu", torch.float16):
            return super().train_step(batch)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        ended.append(step.step)


ended: list[int] = []


def make_parts() -> tuple[nn.Module, torch.optim.Optimizer, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data


def train() -> Scaled:
    ended.clear()
    model, optimizer, data = make_parts()
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
    trainer.train(data, num_epochs=EPOCHS, per_device_batch_size=BATCH, train_dataloader_kwargs=kwargs)
    return trainer


def train_plainly() -> tuple[nn.Module, int, float]:
    """Train as the documentation of torch says, and return the model, the steps that happened and the last rate."""
    model, optimizer, data = make_parts()
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


def test_weights_equal_a_plain_loops_to_the_last_bit() -> None:
    trainer, (model, happened, _) = train(), train_plainly()
    assert 0 < happened < EPOCHS * 2
    assert trainer.progress.steps == happened
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, plain)


def test_skipped_steps_count_nowhere() -> None:
    trainer, (_, happened, rate) = train(), train_plainly()
    assert ended == list(range(1, happened + 1))
    assert trainer.run[EMA_STATE].updates == happened
    assert [step.step for step in trainer.history.steps] == ended
    assert trainer.history.steps[-1].learning_rate * 0.9 == rate
    assert trainer.progress.epochs == EPOCHS


def test_the_norm_is_that_of_the_unscaled_gradients() -> None:
    assert all(step.logged["grad_norm"] < 10 for step in train().history.steps)
