"""Write a mixin: noise on the inputs of training batches. `check_mixin` verifies that it composes."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import BatchMixin, Pair, SeedMixin, StepOutput
from ptacc.errors import OptionError
from ptacc.testing import check_mixin
from ptacc.trainers import ClassificationTrainer


class InputNoiseMixin(BatchMixin[Pair, Tensor]):
    """Adds normal noise to the inputs of training batches.

    Options:
        noise_std: Standard deviation of the noise, 0 or above.
    """

    noise_std: float = 0.0

    @override
    def check_options(self) -> None:
        if self.noise_std < 0:
            raise OptionError(f"{type(self).__name__}(noise_std={self.noise_std}): must be 0 or above.")

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        if self.noise_std:
            inputs = inputs + self.noise_std * torch.randn_like(inputs)
        return super().train_step((inputs, targets))


class NoisyTrainer(InputNoiseMixin, SeedMixin, ClassificationTrainer):
    pass


def main() -> None:
    check_mixin(InputNoiseMixin)
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    blurred = images[:360] + 0.3 * torch.randn(360, 64)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = NoisyTrainer(model, optimizer=AdamW(model.parameters(), lr=3e-3), num_classes=10, noise_std=0.3, seed=0)
    trainer.train(TensorDataset(images[360:], labels[360:]), num_epochs=20)
    trainer.print(f"accuracy: {trainer.evaluate(TensorDataset(blurred, labels[:360])).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
