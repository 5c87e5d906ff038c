"""Find the pixels of digits in noisy scenes with `SegmentationTrainer`. The border of each scene is not labelled."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from ptacc import SeedMixin
from ptacc.trainers import SegmentationTrainer

UNLABELLED = 255


class SceneTrainer(SeedMixin, SegmentationTrainer):
    pass


def make_scenes(digits: Tensor) -> TensorDataset:
    """Place each digit `(8, 8)` in a noisy scene `(1, 16, 16)`, with masks `(16, 16)`: 1 for the digit, 0 elsewhere."""
    scenes = torch.zeros(len(digits), 16, 16)
    for scene, digit in zip(scenes, digits, strict=True):
        row, column = torch.randint(0, 9, (2,)).tolist()
        scene[row : row + 8, column : column + 8] = digit
    masks = (scenes > 0.5).long()
    masks[:, [0, -1], :] = masks[:, :, [0, -1]] = UNLABELLED
    return TensorDataset((scenes + 0.3 * torch.randn(scenes.shape))[:, None], masks)


def main() -> None:
    torch.manual_seed(0)
    digits = torch.tensor(load_digits(return_X_y=True)[0]).float().view(-1, 8, 8) / 16
    train, test = make_scenes(digits[360:]), make_scenes(digits[:360])
    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 2, kernel_size=1),  # (items, 2, 16, 16)
    )
    trainer = SceneTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3),
        loss_func=nn.CrossEntropyLoss(ignore_index=UNLABELLED),
        num_classes=2,
        seed=0,
    )
    trainer.train(train, num_epochs=6, per_device_batch_size=32)
    trainer.print(f"mean IoU: {trainer.evaluate(test).metrics['mean_iou']:.3f}")


if __name__ == "__main__":
    main()
