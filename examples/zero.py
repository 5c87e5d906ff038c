"""Train with ZeRO stage 3 of DeepSpeed, which shards the weights, the gradients and the state of the optimizer.

It needs `pip install "ptacc[deepspeed]"`. Two processes on a machine without GPUs:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/zero.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from ptacc import DeepSpeedMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, SeedMixin
from ptacc.protocols import ZeroStage
from ptacc.schedules import warmup_cosine
from ptacc.trainers import ClassificationTrainer


class ZeroTrainer(SeedMixin, GradAccumMixin, GradClipMixin, LRSchedulerMixin, DeepSpeedMixin, ClassificationTrainer):
    """Accumulates two batches a step. DeepSpeed gets this setting, and that of clipping, from the mixins."""

    zero_stage: ZeroStage | None = 3
    gradient_accumulation_steps: int = 2
    max_grad_norm: float | None = 1.0


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = (TensorDataset(images[part], labels[part]) for part in parts)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    trainer = ZeroTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3),
        create_scheduler=warmup_cosine(0.1),
        num_classes=10,
        seed=0,
    )
    trainer.train(train, num_epochs=8, per_device_batch_size=32 // trainer.distributed.world_size)
    trainer.print(f"accuracy: {trainer.evaluate(test).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
