"""Cross-validate a classifier of wines in five folds: a new model and trainer for each."""

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.optim import AdamW
from torch.utils.data import Subset, TensorDataset

from ptacc import SeedMixin
from ptacc.trainers import ClassificationTrainer


class WineTrainer(SeedMixin, ClassificationTrainer):
    pass


def make_trainer() -> WineTrainer:
    torch.manual_seed(0)  # the same initial weights in each fold
    model = nn.Sequential(nn.BatchNorm1d(13), nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = AdamW(model.parameters(), lr=0.01)
    return WineTrainer(model, optimizer=optimizer, num_classes=3, seed=0, default_callbacks=())


def main() -> None:
    columns, wines = map(torch.tensor, load_wine(return_X_y=True))
    data = TensorDataset(columns.float(), wines)
    accuracies = []
    for fold, (train, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(columns, wines)):
        trainer = make_trainer()
        trainer.train(Subset(data, train.tolist()), num_epochs=20, per_device_batch_size=16)
        accuracies.append(trainer.evaluate(Subset(data, test.tolist())).metrics["accuracy"])
        trainer.print(f"fold {fold}: {accuracies[-1]:.3f}")
    print(f"accuracy: {sum(accuracies) / len(accuracies):.3f}")


if __name__ == "__main__":
    main()
