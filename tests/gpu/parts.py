"""A network, data, and a plain training loop that the trainers of these tests are compared with."""

import copy
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ptacc import AMPMixin, EMAMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, MetricsMixin, Trainer
from ptacc.protocols import Precision

FEATURES, HIDDEN, CLASSES = 64, 256, 10
BATCH, BATCHES, ACCUMULATION, EPOCHS = 32, 12, 2, 2
WINDOWS = BATCHES // ACCUMULATION
MAX_NORM, DECAY, GAMMA = 0.5, 0.9, 0.95
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOO_LARGE = 6e4
"""A number that fp16 can represent, while sums of such numbers overflow."""


class Composed(AMPMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, EMAMixin, MetricsMixin, Trainer):
    """All mixins that depend on what counts as a step."""


def make_net(features: int = FEATURES, hidden: int = HIDDEN, layers: int = 2) -> nn.Module:
    """Make a multilayer perceptron with the same weights in each call."""
    torch.manual_seed(0)
    sizes = [features, *[hidden] * layers]
    blocks = [nn.Sequential(nn.Linear(i, o), nn.GELU()) for i, o in pairwise(sizes)]
    return nn.Sequential(*blocks, nn.Linear(hidden, CLASSES))


def make_data(samples: int = BATCH * BATCHES, features: int = FEATURES, *, overflows: bool = False) -> TensorDataset:
    """Make data, the same in each call; with `overflows`, the third step of an epoch overflows in fp16."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, features, generator=generator)
    if overflows:
        inputs[BATCH * ACCUMULATION * 2 + 1] = TOO_LARGE
    return TensorDataset(inputs, torch.randint(CLASSES, (samples,), generator=generator))


def make_optimizer(net: nn.Module, *, fused: bool = False) -> Optimizer:
    """Make SGD with momentum, or a fused AdamW: the momentum of a fused SGD is wrong after a skipped first step."""
    return AdamW(net.parameters(), lr=1e-3, fused=True) if fused else SGD(net.parameters(), lr=0.1, momentum=0.9)


def train(precision: Precision, runs: int = 1, *, fused: bool = False) -> Composed:
    """Train a `Composed` trainer without shuffling."""
    net, data = make_net(), make_data(overflows=precision == "fp16")
    trainer = Composed(
        net,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(net, fused=fused),
        mixed_precision=precision,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_NORM,
        ema_decay=DECAY,
        create_scheduler=lambda optimizer, plan: StepLR(optimizer, 1, gamma=GAMMA),
        metrics={"accuracy": MulticlassAccuracy(CLASSES, average="micro")},
        default_callbacks=(),
    )
    for _ in range(runs):
        trainer.train(
            data,
            make_data(),
            num_epochs=EPOCHS,
            per_device_batch_size=BATCH,
            train_dataloader_kwargs={"shuffle": False},
        )
    return trainer


@dataclass
class Plain:
    """A plain training loop and its results.

    Args:
        device: The device of the model.
        precision: The precision of the forward pass.
        is_fused: Whether a fused optimizer updates the weights.
        completed: The number of steps that the gradient scaler did not skip.
        learning_rate: The learning rate of the last step.
        norms: The gradient norm of each step.
    """

    device: torch.device
    precision: Precision
    is_fused: bool = False
    completed: int = 0
    learning_rate: float = 0.0
    norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net = make_net().to(self.device)
        self.average = copy.deepcopy(self.net)

    def call(self, net: nn.Module, inputs: Tensor) -> Tensor:
        """Return the outputs of a network in float32, computed in this loop's precision."""
        dtype = DTYPES.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            outputs: Tensor = net(inputs.to(self.device))
        return outputs.float()

    def train(self) -> None:
        """Train as in torch's documentation."""
        optimizer = make_optimizer(self.net, fused=self.is_fused)
        scheduler = StepLR(optimizer, 1, gamma=GAMMA)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        data = make_data(overflows=self.precision == "fp16")
        for start in range(0, EPOCHS * len(data), BATCH * ACCUMULATION):
            for batch in range(start, start + BATCH * ACCUMULATION, BATCH):
                inputs, targets = data[batch % len(data) : batch % len(data) + BATCH]
                loss = nn.functional.cross_entropy(self.call(self.net, inputs), targets.to(self.device))
                scaler.scale(loss / ACCUMULATION).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(self.net.parameters(), MAX_NORM)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= before:
                self.completed += 1
                self.norms.append(norm)
                self.learning_rate = optimizer.param_groups[0]["lr"]
                scheduler.step()
                self._move_average()

    @torch.no_grad()
    def _move_average(self) -> None:
        for average, weight in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight, 1 - DECAY)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the accuracy of the averaged weights."""
        inputs, targets = make_data().tensors
        outputs = torch.cat([self.call(self.average, batch) for batch in torch.split(inputs, BATCH)])
        return float((outputs.argmax(dim=-1).cpu() == targets).double().mean())
