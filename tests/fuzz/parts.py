"""Models, optimizers and schedules for random compositions. All models map 6 features to 3 classes, in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules
from typing_extensions import override

from ptacc import RunPlan

FEATURES, CLASSES = 6, 3
MAX_NORM, MAX_VALUE = 0.5, 0.05
"""The bounds of clipped gradients."""


class Counting(nn.Module):
    """Adds a mean over all inputs of training, which it keeps in buffers, and counts them."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(inputs.detach().mean(0).to(self.mean.dtype), 0.1)
            self.count += len(inputs)
        return inputs + self.mean


class Tied(nn.Module):
    """Uses one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.second(torch.tanh(self.first(inputs))))
        return outputs


class ExtraState(nn.Linear):
    """Scales its outputs by a number that is no tensor, and that training changes."""

    scale = 1.0

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.scale *= 0.99
        return super().forward(input) * self.scale

    @override
    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    @override
    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]


class Forgetful(nn.Linear):
    """Scales its outputs by a number that no checkpoint has: resumed, it must end differently."""

    scale = 1.0

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            self.scale *= 0.9
        return super().forward(input) * self.scale


class Merging(nn.Module):
    """A low-rank update that is merged into the weight in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.down, self.up = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, CLASSES, bias=False)
        self.is_merged = False

    @override
    def train(self, mode: bool = True) -> "Merging":
        if mode == self.is_merged:
            with torch.no_grad():
                self.base.weight += (-1 if mode else 1) * self.up.weight @ self.down.weight
            self.is_merged = not mode
        return super().train(mode)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs)
        return outputs if self.is_merged else outputs + self.up(self.down(inputs))


def layers(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), *middle, nn.Linear(8, CLASSES))


def frozen() -> nn.Module:
    model = layers()
    next(model.parameters()).requires_grad_(False)
    return model


def partly_in_eval_mode() -> nn.Module:
    model = layers(nn.Dropout(0.4), Counting())
    for module in list(model.children())[2:4]:
        module.eval()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, CLASSES),
    "layers": layers,
    "dropout": lambda: layers(nn.Dropout(0.3)),
    "layer norm": lambda: layers(nn.LayerNorm(8)),
    "counting": lambda: layers(Counting()),
    "tied": Tied,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(FEATURES, CLASSES)),
    "extra state": lambda: ExtraState(FEATURES, CLASSES),
    "frozen": frozen,
    "partly in eval mode": partly_in_eval_mode,
    "merging": Merging,
}
BROKEN: dict[str, Callable[[], nn.Module]] = {"forgetful": lambda: Forgetful(FEATURES, CLASSES)}
"""Models that are never drawn."""
DRAWS = frozenset({"dropout", "counting", "spectral norm", "extra state", "partly in eval mode"})
"""Models that draw random numbers, or whose ranks compute buffers from their own batches."""


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (MODELS | BROKEN)[name]().double()


def two_groups(parameters: list[nn.Parameter]) -> Optimizer:
    return optim.SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:], "weight_decay": 0.01}], lr=0.1)


OPTIMIZERS: Mapping[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.1),
    "sgd with momentum": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "two groups": two_groups,
    "adam": lambda parameters: optim.Adam(parameters, lr=0.02),
    "adam with a tensor": lambda parameters: optim.Adam(parameters, lr=torch.tensor(0.02)),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=0.02, amsgrad=True),
    "nadam": lambda parameters: optim.NAdam(parameters, lr=0.02),
    "radam": lambda parameters: optim.RAdam(parameters, lr=0.02),
    "adamax": lambda parameters: optim.Adamax(parameters, lr=0.02),
    "adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.05),
    "adadelta": lambda parameters: optim.Adadelta(parameters, lr=0.5),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=0.01, centered=True, momentum=0.5),
    "rprop": lambda parameters: optim.Rprop(parameters, lr=0.01),
    "asgd": lambda parameters: optim.ASGD(parameters, lr=0.05, t0=2),
    "adafactor": lambda parameters: optim.Adafactor(parameters, lr=0.02),
}


def make_optimizers(model: nn.Module, name: str, *, several: bool) -> dict[str, Optimizer]:
    """Make the optimizer of a name; if there are several, it has every second parameter, and another one the rest."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not several:
        return {"first": OPTIMIZERS[name](weights)}
    second = optim.SGD(weights[1::2], lr=0.05, momentum=0.9)
    return {"first": OPTIMIZERS[name](weights[::2]), "second": second}


def sequential(optimizer: Optimizer, plan: RunPlan) -> Any:
    warmup = schedules.LinearLR(optimizer, 0.1, total_iters=2)
    return schedules.SequentialLR(optimizer, [warmup, schedules.ExponentialLR(optimizer, 0.9)], [2])


def chained(optimizer: Optimizer, plan: RunPlan) -> Any:
    return schedules.ChainedScheduler([schedules.LinearLR(optimizer, 0.1), schedules.ExponentialLR(optimizer, 0.9)])


def steps_of(plan: RunPlan) -> int:
    return plan.total_steps + 1


SCHEDULES: Mapping[str, Callable[[Optimizer, RunPlan], Any] | None] = {
    "none": None,
    "step": lambda optimizer, plan: schedules.StepLR(optimizer, 2, 0.5),
    "multi step": lambda optimizer, plan: schedules.MultiStepLR(optimizer, [1, 3, 3], 0.5),
    "exponential": lambda optimizer, plan: schedules.ExponentialLR(optimizer, 0.8),
    "constant": lambda optimizer, plan: schedules.ConstantLR(optimizer, 0.5, 3),
    "linear": lambda optimizer, plan: schedules.LinearLR(optimizer, 0.2, total_iters=4),
    "lambda": lambda optimizer, plan: schedules.LambdaLR(optimizer, lambda step: 0.9**step),
    "multiplicative": lambda optimizer, plan: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "cosine": lambda optimizer, plan: schedules.CosineAnnealingLR(optimizer, steps_of(plan)),
    "restarts": lambda optimizer, plan: schedules.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "polynomial": lambda optimizer, plan: schedules.PolynomialLR(optimizer, steps_of(plan), 2.0),
    "one cycle": lambda optimizer, plan: schedules.OneCycleLR(
        optimizer, 0.1, total_steps=steps_of(plan), cycle_momentum=False
    ),
    "cyclic": lambda optimizer, plan: schedules.CyclicLR(
        optimizer, 0.01, 0.1, 2, mode="exp_range", gamma=0.9, cycle_momentum=False
    ),
    "sequential": sequential,
    "chained": chained,
    "plateau": lambda optimizer, plan: schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}
WATCHES_LOSS = frozenset({"plateau"})
