"""skorch, without callbacks and without a validation set. It reads the loss at every batch."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from typing import Any

from skorch import NeuralNet
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.speed.jobs import Job


class Net(NeuralNet):
    """Uses the loader and the optimizer of the job."""

    @override
    def initialize_optimizer(self, *_: Any, **__: Any) -> "Net":
        self.optimizer_: Optimizer = self.job.optimizer
        return self

    @override
    def get_iterator(self, dataset: Any, training: bool = False) -> DataLoader[Any]:
        return self.job.loader

    @override
    def get_loss(self, y_pred: Tensor, y_true: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.job.loss_func(y_pred, y_true)


def make_net(job: Job) -> Net:
    net = Net(
        job.model, criterion=job.loss_func, max_epochs=job.epochs, train_split=None, callbacks="disable", verbose=0
    )
    net.job = job
    return net


def train(job: Job) -> float:
    net = make_net(job)
    net.fit(job.loader.dataset, y=None)
    losses = [batch["train_loss"] for epoch in net.history for batch in epoch["batches"]]
    return float(sum(losses) / len(losses))


def evaluate(job: Job) -> float:
    """Run the pass over the validation set, which is a part of `fit`."""
    net = make_net(job).initialize()
    net.history.new_epoch()
    net.run_single_epoch(job.loader, training=False, prefix="valid", step_fn=net.validation_step)
    losses = [batch["valid_loss"] for batch in net.history[-1]["batches"]]
    return float(sum(losses) / len(losses))


RUNS = {"train": train, "evaluate": evaluate}
