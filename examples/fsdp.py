"""Shard a small transformer over two processes with `FSDPMixin`. It reads each image of a digit row by row.

Two processes on a machine without GPUs:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/fsdp.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import FSDPMixin, GradClipMixin, LRSchedulerMixin, SeedMixin
from ptacc.schedules import warmup_cosine
from ptacc.trainers import ClassificationTrainer


class RowTransformer(nn.Module):
    """Classifies images `(items, 8, 8)`, whose rows are the tokens."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.zeros(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    @override
    def forward(self, images: Tensor) -> Tensor:
        rows: Tensor = self.embedding(images) + self.positions  # (items, 8, width)
        for layer in self.layers:
            rows = layer(rows)
        logits: Tensor = self.head(rows.mean(dim=1))
        return logits


class ShardedTrainer(SeedMixin, GradClipMixin, LRSchedulerMixin, FSDPMixin, ClassificationTrainer):
    """Prints which part of the parameters this process holds."""

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        parameters = list(self.model.parameters())
        whole = sum(parameter.numel() for parameter in parameters)
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        self.print(f"each of {self.distributed.world_size} processes holds {held / whole:.0%} of the parameters")


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = (TensorDataset(images[part], labels[part]) for part in parts)

    model = RowTransformer()
    trainer = ShardedTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3),
        create_scheduler=warmup_cosine(0.1),
        num_classes=10,
        fsdp_wrap=[nn.TransformerEncoderLayer],
        max_grad_norm=1.0,
        seed=0,
    )
    trainer.train(train, num_epochs=7, per_device_batch_size=64 // trainer.distributed.world_size)
    trainer.print(f"accuracy: {trainer.evaluate(test).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
