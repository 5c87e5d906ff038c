"""Classify images in folders with a ResNet of timm, and with its loaders, Mixup, losses, optimizer and schedule."""

import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import ImageDataset, Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import EMAMixin, LRSchedulerMixin, MetricsMixin, Pair, RunPlan, SeedMixin, StepOutput, Trainer


class ImageTrainer(SeedMixin, EMAMixin, LRSchedulerMixin, MetricsMixin, Trainer):
    mixup: Mixup

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return super().train_step(self.mixup(*batch))

    @override
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)


def cosine(optimizer: Optimizer, plan: RunPlan) -> CosineLRScheduler:
    return CosineLRScheduler(
        optimizer,
        t_initial=plan.total_steps,
        t_in_epochs=False,
        warmup_t=plan.total_steps // 10,
        warmup_lr_init=1e-4,
    )


def write_images(folder: Path) -> None:
    """Write the digits as `train/7/123.png` and so on: 1,437 for training and 360 for the test."""
    for index, (pixels, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        path = folder / ("test" if index % 5 == 0 else "train") / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8").reshape(8, 8)).save(path)


def load_images(folder: Path, *, is_training: bool) -> DataLoader[object]:
    # The prefetcher of timm would move the batches to the device, which ptacc does.
    loader = create_loader(
        ImageDataset(str(folder)),
        input_size=(3, 24, 24),
        batch_size=32,
        is_training=is_training,
        scale=(0.7, 1.0),
        hflip=0.0,
        num_workers=0,
        use_prefetcher=False,
    )
    assert isinstance(loader, DataLoader)
    return loader


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    trainer = ImageTrainer(
        model,
        loss_func=SoftTargetCrossEntropy(),
        optimizer=create_optimizer_v2(model, opt="lookahead_adamw", lr=3e-3, weight_decay=0.05),
        create_scheduler=cosine,
        mixup=Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10),
        ema_decay=0.98,
        metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
        seed=0,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        train, test = (load_images(folder / part, is_training=part == "train") for part in ("train", "test"))
        history = trainer.train(train, test, num_epochs=8)
    trainer.print(f"accuracy: {history[-1].metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
