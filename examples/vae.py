"""Train a variational autoencoder on digits: a loop of your own, whose loss has two parts that are reported."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import AdamW
from typing_extensions import override

from ptacc import SeedMixin, StepOutput, TrainingLoop


class VAE(nn.Module):
    def __init__(self, latent_size: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * latent_size))
        self.decoder = nn.Sequential(nn.Linear(latent_size, 128), nn.ReLU(), nn.Linear(128, 64))

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of pixels `(items, 64)`, and means and log-variances of the latents `(items, latent)`."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(latent), mean, log_variance


class VAETrainer(SeedMixin, TrainingLoop[Tensor, Tensor, VAE]):
    """Its batches are images `(items, 64)`, with pixels from 0 to 1. Evaluations have the same loss."""

    @override
    def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
        logits, mean, log_variance = self.forward(batch)
        reconstruction = binary_cross_entropy_with_logits(logits, batch, reduction="sum") / len(batch)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean() / 2
        parts = {"reconstruction": reconstruction.detach(), "divergence": divergence.detach()}
        return StepOutput(loss=reconstruction + divergence, outputs=logits.sigmoid(), logged=parts)


def main() -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits(return_X_y=True)[0]).float() / 16
    model = VAE()
    trainer = VAETrainer(model, optimizer=AdamW(model.parameters(), lr=2e-3), seed=0)
    trainer.train(list(images[360:]), num_epochs=40, per_device_batch_size=64)
    result = trainer.evaluate(list(images[:360]))
    trainer.print({name: round(value, 2) for name, value in result.metrics.items()})
    new_digits = model.decoder(torch.randn(4, 8, device=trainer.accelerator.device)).sigmoid()  # (4, 64)
    trainer.print(f"pixels of new digits: {new_digits.min():.2f} to {new_digits.max():.2f}")
    trainer.print(f"loss: {result.loss:.2f}")


if __name__ == "__main__":
    main()
