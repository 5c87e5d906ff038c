"""GANs: noise, hooks, evaluations, and mistakes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.optim import SGD, Optimizer
from typing_extensions import override

from ptacc import OptimizerDict
from ptacc.errors import ModelError, OptionError
from ptacc.trainers import GANTrainer
from tests.trainers.cases import GAN, make_gan, make_inputs


def make(trainer: type[GANTrainer[Any]] = GANTrainer, **options: Any) -> GANTrainer[GAN]:
    gan, optimizers = make_gan()
    given: dict[str, Any] = {"optimizer": optimizers, "latent_size": 3, "default_callbacks": (), **options}
    return trainer(gan, **given)


def test_noise_and_points_of_the_penalty_are_drawn_from_the_global_generator() -> None:
    trainer, real = make(gradient_penalty=1.0), make_inputs()
    gan, _ = make_gan()
    torch.manual_seed(7)
    generated = gan.generator(torch.randn(24, 3).double()).detach()
    noise, shares = trainer.sample_noise(real), torch.rand(24, 1, dtype=torch.float64)
    assert noise.shape == (24, 3)
    assert noise.dtype == torch.float64
    torch.manual_seed(8)
    points = trainer.penalty_points(real, generated)
    torch.manual_seed(8)
    torch.testing.assert_close(points, real + torch.rand_like(shares) * (generated - real))


def test_an_evaluation_has_the_loss_of_the_discriminator() -> None:
    trainer, real = make(), make_inputs()
    torch.manual_seed(7)
    generated = trainer.model.generator(torch.randn(24, 3, dtype=torch.float64))
    logits = trainer.model.discriminator(real), trainer.model.discriminator(generated)
    expected = -logsigmoid(logits[0]).mean() - logsigmoid(-logits[1]).mean()
    torch.manual_seed(7)
    assert trainer.evaluate(list(real), per_device_batch_size=24).loss == pytest.approx(expected.item())


def test_predictions_are_made_from_noise() -> None:
    trainer, noise = make(), make_inputs()[:, :3]
    torch.testing.assert_close(torch.stack(trainer.predict(list(noise))), trainer.model.generator(noise).detach())


class OtherNames(GANTrainer[nn.ModuleDict]):
    latent_size: int = 3

    @override
    def generate(self, noise: Tensor) -> Tensor:
        samples: Tensor = self.model["painter"](noise)
        return samples

    @override
    def discriminate(self, samples: Tensor) -> Tensor:
        logits: Tensor = self.model["critic"](samples)
        return logits


def test_hooks_take_a_model_with_other_names() -> None:
    model = nn.ModuleDict({"painter": nn.Linear(3, 4), "critic": nn.Linear(4, 1)}).double()
    optimizers: dict[str, Optimizer] = {
        "generator": SGD(model["painter"].parameters(), lr=0.1),
        "discriminator": SGD(model["critic"].parameters(), lr=0.1),
    }
    trainer = OtherNames(model, optimizer=OptimizerDict(optimizers), default_callbacks=())
    step = trainer.train(list(make_inputs()), max_steps=1).steps[0]
    assert {"generator/loss", "discriminator/loss"} <= step.logged.keys()
    with pytest.raises(ModelError, match=r"a ModuleDict, has no submodule 'generator'. Override generate\(\)"):
        GANTrainer(model, optimizer=OptimizerDict(optimizers), latent_size=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_size": 0}, "latent_size=0"),
        ({"generator_every": 0}, "generator_every=0"),
        ({"gan_loss": "hinge"}, "one of non_saturating, wasserstein"),
        ({"gradient_penalty": -1.0}, "must be 0 or above"),
        ({"optimizer": SGD(GAN().parameters(), lr=0.1)}, r"must be OptimizerDict\({'generator': ..., 'discriminator'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)
