"""Generate digits with `GANTrainer`: convolutional networks. A classifier of real digits judges the samples."""

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim import Adam

from ptacc import EMAMixin, OptimizerDict, SeedMixin
from ptacc.trainers import GANTrainer

LATENT = 16


class DCGAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Unflatten(1, (LATENT, 1, 1)),
            nn.ConvTranspose2d(LATENT, 64, kernel_size=2),  # (items, 64, 2, 2)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1),  # (items, 32, 4, 4)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, kernel_size=4, stride=2, padding=1),  # (items, 1, 8, 8)
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, 1),
        )


class DigitsGAN(SeedMixin, EMAMixin, GANTrainer[DCGAN]):
    """Evaluations and predictions have averaged weights."""

    ema_decay: float = 0.99


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16
    model = DCGAN()
    optimizers = {name: Adam(part.parameters(), lr=1e-3, betas=(0.5, 0.999)) for name, part in model.named_children()}
    trainer = DigitsGAN(model, optimizer=OptimizerDict(optimizers), latent_size=LATENT, seed=0)
    trainer.train(list(images), num_epochs=40, per_device_batch_size=64)

    samples = torch.stack(trainer.predict(list(torch.randn(500, LATENT)))).cpu()  # (500, 1, 8, 8)
    judge = LogisticRegression(max_iter=2000).fit(pixels / 16, labels)
    probabilities = torch.tensor(judge.predict_proba(samples.flatten(1).numpy()))
    confidence, digits = probabilities.max(dim=1)
    trainer.print(f"digits: {len(set(digits.tolist()))} of 10")
    trainer.print(f"recognised: {(confidence > 0.8).double().mean():.3f}")


if __name__ == "__main__":
    main()
