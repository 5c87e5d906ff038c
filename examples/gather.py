"""Compute a metric of your own over the samples of all processes with `self.gather`: scikit-learn's ROC AUC.

Two processes on a machine without GPUs:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/gather.py
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Pair, RestoreBestWeights, SeedMixin, StepOutput, Trainer


class TumourTrainer(SeedMixin, Trainer):
    """Reports the area under the ROC curve of each evaluation as `auc`."""

    @override
    def eval_value_names(self) -> frozenset[str]:
        return super().eval_value_names() | {"auc"}

    @override
    def on_evaluation_start(self, name: str) -> None:
        super().on_evaluation_start(name)
        self.rows = [torch.zeros(0, 2, device=self.device)]  # a process may get no batch

    @override
    def on_eval_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_eval_batch_end(batch, output)
        self.rows.append(torch.cat([output.outputs, batch[1]], dim=1))

    @override
    def compute_metrics(self) -> dict[str, float]:
        scores, labels = self.gather(torch.cat(self.rows)).cpu().unbind(dim=1)
        return super().compute_metrics() | {"auc": float(roc_auc_score(labels, scores))}


def main() -> None:
    torch.manual_seed(0)
    columns, labels = (torch.tensor(part).float() for part in load_breast_cancer(return_X_y=True))
    columns = (columns - columns.mean(dim=0)) / columns.std(dim=0)  # (569, 30)
    rest, test = train_test_split(range(len(labels)), test_size=150, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=100, stratify=labels[rest], random_state=0)
    data = [TensorDataset(columns[part], labels[part, None]) for part in (train, validation, test)]

    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1))
    trainer = TumourTrainer(
        model,
        loss_func=nn.BCEWithLogitsLoss(),
        optimizer=AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
        callbacks=[RestoreBestWeights("auc", mode="max")],
        seed=0,
    )
    trainer.train(data[0], data[1], num_epochs=20, per_device_batch_size=32 // trainer.distributed.world_size)
    trainer.print(f"ROC AUC: {trainer.evaluate(data[2]).metrics['auc']:.4f}")


if __name__ == "__main__":
    main()
