"""Predict a number from the columns of a table with `RegressionTrainer`: the progress of diabetes in 442 patients."""

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from ptacc import RestoreBestWeights, SeedMixin
from ptacc.trainers import RegressionTrainer


class TableTrainer(SeedMixin, RegressionTrainer):
    pass


def main() -> None:
    torch.manual_seed(0)
    columns, progress = (torch.tensor(part).float() for part in load_diabetes(return_X_y=True, scaled=False))
    train, validation, test = 0, 1, 2
    rest, held_out = train_test_split(range(len(progress)), test_size=90, random_state=0)
    parts = [*train_test_split(rest, test_size=60, random_state=0), held_out]

    mean, deviation = columns[parts[train]].mean(dim=0), columns[parts[train]].std(dim=0)
    centre, scale = progress[parts[train]].mean(), progress[parts[train]].std()
    inputs, targets = (columns - mean) / deviation, (progress - centre) / scale  # (442, 10) and (442,)
    data = [TensorDataset(inputs[part], targets[part]) for part in parts]

    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1))
    trainer = TableTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3, weight_decay=0.1),
        callbacks=[RestoreBestWeights("eval_loss")],
        seed=0,
    )
    trainer.train(data[train], data[validation], num_epochs=40, per_device_batch_size=32)
    metrics = trainer.evaluate(data[test]).metrics
    trainer.print(f"mean absolute error: {metrics['mae'] * float(scale):.1f} of a range from 25 to 346")
    trainer.print(f"R2: {metrics['r2']:.3f}")


if __name__ == "__main__":
    main()
