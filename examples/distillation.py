"""Distil a network into one with a fiftieth of its parameters with `DistillationTrainer`."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ptacc import MetricsMixin, SeedMixin
from ptacc.trainers import ClassificationTrainer, DistillationTrainer


class TeacherTrainer(SeedMixin, ClassificationTrainer):
    pass


class StudentTrainer(SeedMixin, MetricsMixin, DistillationTrainer):
    pass


def make_model(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def main() -> None:
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    parts = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, test = (TensorDataset(images[part].float() / 16, labels[part]) for part in parts)

    teacher = make_model(hidden=512)
    teaching = TeacherTrainer(teacher, optimizer=AdamW(teacher.parameters(), lr=2e-3), num_classes=10, seed=0)
    teaching.train(train, num_epochs=15)

    student = make_model(hidden=10)
    trainer = StudentTrainer(
        student,
        teacher=teacher,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(student.parameters(), lr=5e-3),
        temperature=4.0,
        teacher_share=0.9,
        metrics={"accuracy": MulticlassAccuracy(10, average="micro")},
        seed=0,
    )
    trainer.train(train, num_epochs=30)
    trainer.print(f"accuracy of the teacher: {teaching.evaluate(test).metrics['accuracy']:.3f}")
    trainer.print(f"accuracy: {trainer.evaluate(test).metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
