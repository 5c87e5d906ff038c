"""Find the digits 0, 1 and 2 in scenes, with a detector of torchvision and a metric of your own."""

from typing import TypeAlias

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from typing_extensions import override

from ptacc import LRSchedulerMixin, MetricsMixin, SeedMixin, StepOutput, TrainingLoop
from ptacc.schedules import warmup_cosine

Boxes: TypeAlias = dict[str, Tensor]  # of an image: boxes (boxes, 4), labels (boxes,), and scores (boxes,) if detected
Sample: TypeAlias = tuple[Tensor, Boxes]
Batch: TypeAlias = tuple[list[Tensor], list[Boxes]]


class DetectionTrainer(
    SeedMixin,
    LRSchedulerMixin,
    MetricsMixin[Batch, list[Boxes]],
    TrainingLoop[Batch, list[Boxes], nn.Module, Sample],
):
    @override
    def count_items(self, batch: Batch) -> int:
        return len(batch[0])

    @override
    def train_step(self, batch: Batch) -> StepOutput[list[Boxes]]:
        losses: dict[str, Tensor] = self.model(*batch)
        return StepOutput(torch.stack([*losses.values()]).sum(), outputs=[], logged=losses)

    @override
    def eval_step(self, batch: Batch) -> StepOutput[list[Boxes]]:
        self.model.train()  # a detector returns losses in training mode, and boxes in eval mode
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # else it would change its statistics
        losses = self.train_step(batch)
        self.model.eval()
        return StepOutput(losses.loss, outputs=self.model(batch[0]))


class FoundObjects(Metric):
    """F1 score of detections above a score: they need the label of an object, and half of its box."""

    found: Tensor
    detected: Tensor
    wanted: Tensor

    def __init__(self, min_score: float = 0.3) -> None:
        super().__init__()
        self.min_score = min_score
        for name in ("found", "detected", "wanted"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    @override
    def update(self, detections: list[Boxes], targets: list[Boxes]) -> None:
        for detection, target in zip(detections, targets, strict=True):
            is_sure = detection["scores"] >= self.min_score
            overlaps = box_iou(target["boxes"], detection["boxes"][is_sure]) >= 0.5
            is_same = target["labels"][:, None] == detection["labels"][is_sure]
            self.found += (overlaps & is_same).any(dim=1).sum()
            self.detected += is_sure.sum()
            self.wanted += len(target["labels"])

    @override
    def compute(self) -> Tensor:
        return 2 * self.found / (self.detected + self.wanted)


def make_scenes(digits: Tensor, labels: Tensor, num_scenes: int) -> list[Sample]:
    """Place a digit `(8, 8)` in one to four quarters of each scene `(1, 32, 32)`."""
    scenes: list[Sample] = []
    for _ in range(num_scenes):
        quarters = torch.randperm(4)[: int(torch.randint(1, 5, ()))]
        corners = torch.stack([quarters % 2, quarters // 2], dim=1) * 16 + torch.randint(0, 9, (len(quarters), 2))
        chosen = torch.randint(len(digits), (len(quarters),))
        scene = 0.2 * torch.rand(1, 32, 32)
        for digit, (x, y) in zip(digits[chosen], corners.tolist(), strict=True):
            scene[0, y : y + 8, x : x + 8] += digit
        scenes.append((scene, {"boxes": torch.cat([corners, corners + 8], dim=1).float(), "labels": labels[chosen]}))
    return scenes


def collate(samples: list[Sample]) -> Batch:
    return [scene for scene, _ in samples], [boxes for _, boxes in samples]


class Backbone(nn.Sequential):
    out_channels = 64

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),  # (items, 32, 32, 32)
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1, stride=2),  # (items, 64, 16, 16)
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, padding=1, stride=2),  # (items, 64, 8, 8)
            nn.GroupNorm(8, 64),
            nn.ReLU(),
        )


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, labels = images[labels < 3].float().view(-1, 8, 8) / 16, labels[labels < 3]
    train, test = make_scenes(images[140:], labels[140:], 600), make_scenes(images[:140], labels[:140], 100)
    model = FCOS(
        Backbone(),
        num_classes=3,
        anchor_generator=AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),)),
        min_size=32,
        max_size=32,
        image_mean=[0.1],
        image_std=[0.3],
    )
    trainer = DetectionTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=2e-3),
        create_scheduler=warmup_cosine(0.1),
        metrics={"f1": FoundObjects()},
        seed=0,
    )
    history = trainer.train(train, test, collate_fn=collate, num_epochs=10, per_device_batch_size=16)
    trainer.print(f"F1: {history[-1].metrics['f1']:.3f}")


if __name__ == "__main__":
    main()
