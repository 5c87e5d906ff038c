"""Learn the distribution of points with a Wasserstein GAN, whose critic has a gradient penalty and more updates."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.optim import Adam

from ptacc import EMAMixin, OptimizerDict, SeedMixin
from ptacc.trainers import GANTrainer

LATENT = 2


class WGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = make_network(LATENT, 2)
        self.discriminator = make_network(2, 1)  # gives a score, as a critic


def make_network(inputs: int, outputs: int, width: int = 128) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


class PointsGAN(SeedMixin, EMAMixin, GANTrainer[WGAN]):
    """Predictions have averaged weights."""

    ema_decay: float = 0.99


def draw_points(count: int) -> Tensor:
    """Draw points `(count, 2)` from eight narrow normal distributions on a circle."""
    angles = torch.randint(0, 8, (count,)) * torch.pi / 4
    return torch.stack([angles.cos(), angles.sin()], dim=1) + 0.05 * torch.randn(count, 2)


def measure_distance(points: Tensor, others: Tensor) -> float:
    """Return the Wasserstein distance of two sets of the same size: the mean distance in their best assignment."""
    distances = torch.cdist(points, others)
    return float(distances[linear_sum_assignment(distances)].mean())


def main() -> None:
    torch.manual_seed(0)
    model = WGAN()
    optimizers = {name: Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.9)) for name, part in model.named_children()}
    trainer = PointsGAN(
        model,
        optimizer=OptimizerDict(optimizers),
        latent_size=LATENT,
        gan_loss="wasserstein",
        gradient_penalty=1.0,
        generator_every=5,
        seed=0,
    )
    trainer.train(list(draw_points(20_000)), max_steps=3000, per_device_batch_size=128)
    samples = torch.stack(trainer.predict(list(torch.randn(1000, LATENT)))).cpu()  # (1000, 2)
    real = draw_points(1000)
    trainer.print(f"distance of other real points: {measure_distance(draw_points(1000), real):.3f}")
    trainer.print(f"distance: {measure_distance(samples, real):.3f}")


if __name__ == "__main__":
    main()
