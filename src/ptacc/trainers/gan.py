"""Generative adversarial networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Literal, Protocol, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.callback import overrides
from ptacc.errors import ModelError, OptionError
from ptacc.loop.updates import MultiUpdateLoop
from ptacc.model.optimizer_dict import OptimizerDict
from ptacc.types.aliases import ModelT
from ptacc.types.outputs import StepOutput, Update
from ptacc.validation import check_at_least

GANLoss: TypeAlias = Literal["non_saturating", "wasserstein"]


class GANTrainer(MultiUpdateLoop[Tensor, Tensor, ModelT], Generic[ModelT]):
    """Trains a generator and a discriminator on batches of real samples `(items, ...)`.

    The model has the submodules `generator` and `discriminator`, and `optimizer` is an `OptimizerDict` with these
    names. The generator makes samples from noise `(items, latent_size)`. The discriminator gives each sample a logit,
    or for Wasserstein GANs a score. Each step updates the discriminator, and then, in every `generator_every`-th one,
    the generator. Override the hooks for other models, noise and losses.

    Options:
        latent_size: The number of normal random numbers that a sample is made from.
        gan_loss: `"non_saturating"`, or `"wasserstein"`, which needs `gradient_penalty=10`, or another constraint of
            the discriminator such as spectral norm.
        gradient_penalty: Weight of the mean of `(norm - 1)^2` over the norms of the discriminator's gradients between
            real and generated samples. By default 0, without a penalty.
        generator_every: Number of updates of the discriminator for each one of the generator.

    Hooks: `generate`, `discriminate`, `sample_noise`, `penalty_points`, `compute_discriminator_loss` and
    `compute_generator_loss`. `eval_step` reports the discriminator's loss, and has generated samples as outputs.
    `predict` makes samples from a dataset of noise.

    Source: https://arxiv.org/abs/1406.2661 (non-saturating), https://arxiv.org/abs/1704.00028 (gradient penalty).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ptacc import OptimizerDict
        >>> from ptacc.trainers import GANTrainer
        >>> gan = nn.ModuleDict({"generator": nn.Linear(2, 4), "discriminator": nn.Linear(4, 1)})
        >>> optimizers = {name: torch.optim.Adam(part.parameters()) for name, part in gan.items()}
        >>> trainer = GANTrainer(gan, optimizer=OptimizerDict(optimizers), latent_size=2, default_callbacks=())
        >>> history = trainer.train(list(torch.randn(64, 4)), num_epochs=1)
        >>> trainer.predict(list(torch.randn(3, 2)))[0].shape
        torch.Size([4])
    """

    latent_size: int
    gan_loss: GANLoss = "non_saturating"
    gradient_penalty: float = 0.0
    generator_every: int = 1

    @override
    def check_options(self) -> None:
        check_gan(self)

    @hook("default")
    def generate(self, noise: Tensor) -> Tensor:
        """Make samples from noise. A default hook: `model.generator(noise)`."""
        samples: Tensor = cast(GANModel, self.model).generator(noise)
        return samples

    @hook("default")
    def discriminate(self, samples: Tensor) -> Tensor:
        """Return a logit or score for each sample. A default hook: `model.discriminator(samples)`."""
        logits: Tensor = cast(GANModel, self.model).discriminator(samples)
        return logits

    @hook("default")
    def sample_noise(self, real: Tensor) -> Tensor:
        """Draw noise for a batch of real samples. A default hook: normal random numbers `(items, latent_size)`."""
        return torch.randn(len(real), self.latent_size, dtype=real.dtype, device=real.device)

    @hook("default")
    def penalty_points(self, real: Tensor, generated: Tensor) -> Tensor:
        """Return where the gradient is penalised. A default hook: random points between real and generated samples."""
        shares = torch.rand(len(real), *(1,) * (real.dim() - 1), dtype=real.dtype, device=real.device)
        return torch.lerp(real, generated, shares)

    @hook("default")
    def compute_discriminator_loss(self, real: Tensor, generated: Tensor) -> Tensor:
        """Return the discriminator's loss from its logits of real and of generated samples. A default hook."""
        if self.gan_loss == "wasserstein":
            return generated.mean() - real.mean()
        return -logsigmoid(real).mean() - logsigmoid(-generated).mean()

    @hook("default")
    def compute_generator_loss(self, generated: Tensor) -> Tensor:
        """Return the generator's loss from the discriminator's logits of its samples. A default hook."""
        return -generated.mean() if self.gan_loss == "wasserstein" else -logsigmoid(generated).mean()

    @override
    def train_updates(self, batch: Tensor) -> Iterator[Update[Tensor]]:
        updates_generator = self.progress.steps % self.generator_every == self.generator_every - 1
        with torch.set_grad_enabled(updates_generator):
            generated = self.generate(self.sample_noise(batch))
        samples = generated.detach()
        loss = self.compute_discriminator_loss(self.discriminate(batch), self.discriminate(samples))
        if self.gradient_penalty:
            loss = loss + self.gradient_penalty * self._compute_penalty(self.penalty_points(batch, samples))
        yield Update("discriminator", loss=loss, outputs=samples)
        if updates_generator:
            yield Update("generator", loss=self.compute_generator_loss(self.discriminate(generated)))

    @override
    def eval_step(self, batch: Tensor) -> StepOutput[Tensor]:
        samples = self.generate(self.sample_noise(batch))
        loss = self.compute_discriminator_loss(self.discriminate(batch), self.discriminate(samples))
        return StepOutput(loss=loss, outputs=samples)

    @override
    def predict_step(self, batch: Tensor) -> Tensor:
        """Make samples from a batch of noise."""
        return self.generate(batch)

    def _compute_penalty(self, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        (gradients,) = torch.autograd.grad(self.discriminate(points).sum(), points, create_graph=True)
        norms: Tensor = gradients.flatten(1).norm(dim=1)
        return (norms - 1).square().mean()


class GANModel(Protocol):
    """A model with a generator and a discriminator."""

    generator: nn.Module
    discriminator: nn.Module


def check_gan(trainer: GANTrainer[nn.Module]) -> None:
    """Raise for options out of range, and for a model or optimizers that do not fit."""
    owner, optimizer = type(trainer).__name__, trainer.optimizer
    check_at_least(owner, "latent_size", trainer.latent_size, 1)
    check_at_least(owner, "generator_every", trainer.generator_every, 1)
    if trainer.gan_loss not in get_args(GANLoss):
        raise OptionError(f"{owner}(gan_loss={trainer.gan_loss!r}): must be one of {', '.join(get_args(GANLoss))}.")
    if not trainer.gradient_penalty >= 0:
        raise OptionError(f"{owner}(gradient_penalty={trainer.gradient_penalty!r}): must be 0 or above.")
    if not isinstance(optimizer, OptimizerDict) or not {"generator", "discriminator"} <= set(optimizer):
        raise OptionError(
            f"{owner}(optimizer=...): must be OptimizerDict({{'generator': ..., 'discriminator': ...}}), with an "
            "optimizer for the parameters of each."
        )
    for part, method in (("generator", "generate"), ("discriminator", "discriminate")):
        if not hasattr(trainer.model, part) and not overrides(trainer, GANTrainer, method):
            raise ModelError(
                f"{owner}: the model, a {type(trainer.model).__name__}, has no submodule {part!r}. Override {method}() "
                "for a model with other names."
            )
