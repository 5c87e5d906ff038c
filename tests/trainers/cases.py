"""The ready trainers, each with small data in float64 and the same training as a plain loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, mse_loss, normalize
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import GradAccumMixin, OptimizerDict, SeedMixin
from ptacc.trainers import (
    ClassificationTrainer,
    ContrastiveTrainer,
    DistillationTrainer,
    GANTrainer,
    RegressionTrainer,
    SegmentationTrainer,
)
from tests.ranks import run_ranks

SAMPLES, BATCH, STEPS = 24, 6, 8
State = dict[str, Tensor]


class Classification(SeedMixin, GradAccumMixin, ClassificationTrainer): ...


class Regression(SeedMixin, GradAccumMixin, RegressionTrainer): ...


class Segmentation(SeedMixin, GradAccumMixin, SegmentationTrainer): ...


class Distillation(SeedMixin, GradAccumMixin, DistillationTrainer): ...


class Contrastive(SeedMixin, GradAccumMixin, ContrastiveTrainer): ...


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Adversarial(SeedMixin, GradAccumMixin, GANTrainer[GAN]):
    """Its noise depends on the samples alone, so that it is the same in every split of a step."""

    latent_size: int = 3

    @override
    def sample_noise(self, real: Tensor) -> Tensor:
        return real[:, :3].sin()

    @override
    def penalty_points(self, real: Tensor, generated: Tensor) -> Tensor:
        return (real + generated) / 2


def make_data(*targets: Tensor) -> TensorDataset:
    return TensorDataset(make_inputs(), *targets)


def make_inputs(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *(shape or (4,)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_net(outputs: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


LABELS = torch.arange(SAMPLES) * 7 % 3
CLASS_WEIGHTS = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
NUMBERS = make_inputs().sum(dim=1)
IMAGES = make_inputs(2, 4, 4)
MASKS = IMAGES.sum(dim=1).gt(0).long().masked_fill(IMAGES[:, 0] > 1, -100)
TEACHER = make_net(3, seed=5)


def classification_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], CLASS_WEIGHTS, label_smoothing=0.1)


def regression_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return mse_loss(model(batch[0])[:, 0], batch[1])


def segmentation_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def distillation_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    outputs, teacher = model(batch[0]), TEACHER(batch[0]).detach()
    student = log_softmax(outputs / 3, dim=1)
    of_teacher = kl_div(student, log_softmax(teacher / 3, dim=1), reduction="batchmean", log_target=True) * 9
    return torch.lerp(cross_entropy(outputs, batch[1]), of_teacher, 0.25)


def contrastive_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    first, second = (normalize(part, dim=1) for part in model(torch.cat(batch)).chunk(2))
    own = torch.arange(len(first))
    return (cross_entropy(first @ second.T / 0.1, own) + cross_entropy(second @ first.T / 0.1, own)) / 2


def train_plainly(loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]) -> Callable[..., None]:
    def loop(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, ...]]) -> None:
        for batch in batches:
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return loop


def train_gan(model: GAN, optimizers: OptimizerDict, batches: list[Tensor]) -> None:
    for real in batches:
        generated = model.generator(real[:, :3].sin())
        logits = model.discriminator(real), model.discriminator(generated.detach())
        (-logsigmoid(logits[0]).mean() - logsigmoid(-logits[1]).mean()).backward()  # type: ignore[no-untyped-call]
        optimizers["discriminator"].step()
        model.zero_grad()
        (-logsigmoid(model.discriminator(generated)).mean()).backward()  # type: ignore[no-untyped-call]
        optimizers["generator"].step()
        model.zero_grad()


def train_wgan(model: GAN, optimizers: OptimizerDict, batches: list[Tensor]) -> None:
    critic = model.discriminator
    for step, real in enumerate(batches):
        generated = model.generator(real[:, :3].sin())
        between = ((real + generated) / 2).detach().requires_grad_()
        scores = critic(real), critic(generated.detach())
        (gradients,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        (scores[1].mean() - scores[0].mean() + 10 * (gradients.norm(dim=1) - 1).square().mean()).backward()
        optimizers["discriminator"].step()
        model.zero_grad()
        if step % 2 == 1:
            (-critic(generated).mean()).backward()
            optimizers["generator"].step()
            model.zero_grad()


def make_gan() -> tuple[GAN, OptimizerDict]:
    torch.manual_seed(0)
    gan = GAN().double()
    optimizers = {name: Adam(part.parameters(), lr=0.01) for name, part in gan.named_children()}
    return gan, OptimizerDict(optimizers)


def make_classifier(outputs: int) -> Callable[[], tuple[nn.Module, Optimizer]]:
    def make() -> tuple[nn.Module, Optimizer]:
        model = make_net(outputs)
        return model, SGD(model.parameters(), lr=0.1, momentum=0.9)

    return make


def make_segmenter() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, kernel_size=1).double()
    return model, SGD(model.parameters(), lr=0.1)


@dataclass(frozen=True)
class Case:
    """A ready trainer, its options, its model and optimizer, its data, and the same training as a plain loop."""

    trainer: Any
    options: dict[str, Any]
    make: Callable[[], tuple[Any, Any]]
    data: Any
    plain: Callable[..., None]
    accumulates: bool = True


WEIGHTED = {"num_classes": 3, "label_smoothing": 0.1, "loss_func": nn.CrossEntropyLoss(CLASS_WEIGHTS)}
DISTILLED = {"loss_func": nn.CrossEntropyLoss(), "teacher": TEACHER, "temperature": 3.0, "teacher_share": 0.25}
WASSERSTEIN = {"gan_loss": "wasserstein", "gradient_penalty": 10.0, "generator_every": 2}
VIEWS = make_data(make_inputs() + 0.1)
CASES = {
    "classification": Case(
        Classification, WEIGHTED, make_classifier(3), make_data(LABELS), train_plainly(classification_loss)
    ),
    "regression": Case(Regression, {}, make_classifier(1), make_data(NUMBERS), train_plainly(regression_loss)),
    "segmentation": Case(
        Segmentation, {"num_classes": 2}, make_segmenter, TensorDataset(IMAGES, MASKS), train_plainly(segmentation_loss)
    ),
    "distillation": Case(
        Distillation, DISTILLED, make_classifier(3), make_data(LABELS), train_plainly(distillation_loss)
    ),
    "contrastive": Case(Contrastive, {}, make_classifier(5), VIEWS, train_plainly(contrastive_loss), accumulates=False),
    "gan": Case(Adversarial, {}, make_gan, list(make_inputs()), train_gan),
    "wgan": Case(Adversarial, WASSERSTEIN, make_gan, list(make_inputs()), train_wgan),
}


def train(case: Case, size: int = BATCH, steps: int = STEPS, **options: Any) -> State:
    """Train on batches in the order of the data, and return the weights and the losses."""
    model, optimizer = case.make()
    trainer = case.trainer(model, optimizer=optimizer, seed=0, default_callbacks=(), **{**case.options, **options})
    in_order = {"shuffle": False}
    trainer.train(case.data, max_steps=steps, per_device_batch_size=size, train_dataloader_kwargs=in_order)
    losses = torch.tensor([step.loss for step in trainer.history.steps], dtype=torch.float64)
    return {**{name: value.detach().clone() for name, value in model.state_dict().items()}, "losses": losses}


def train_as_plain_loop(case: Case) -> State:
    model, optimizer = case.make()
    starts = [start for _ in range(STEPS * BATCH // SAMPLES) for start in range(0, SAMPLES, BATCH)]
    tensors = case.data.tensors if isinstance(case.data, TensorDataset) else (torch.stack(case.data),)
    batches = [[tensor[start : start + BATCH] for tensor in tensors] for start in starts]
    case.plain(model, optimizer, [tuple(batch) if len(batch) > 1 else batch[0] for batch in batches])
    state: State = model.state_dict()
    return state


def train_on_ranks(case: Case, ranks: int, accumulated: int = 1) -> list[State]:
    size = BATCH // (ranks * accumulated)
    return run_ranks(lambda: train(case, size, gradient_accumulation_steps=accumulated), ranks)
