"""pytorch-accelerated, without callbacks."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false

from typing import Any

from pytorch_accelerated import Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.speed.jobs import Job


class JobTrainer(Trainer):
    job: Job

    @override
    def create_train_dataloader(self, *_: Any, **__: Any) -> DataLoader[Any]:
        return self.job.loader

    @override
    def create_eval_dataloader(self, *_: Any, **__: Any) -> DataLoader[Any]:
        return self.job.loader


def make_trainer(job: Job) -> Any:
    trainer = JobTrainer(job.model, loss_func=job.loss_func, optimizer=job.optimizer, callbacks=())
    trainer.job = job
    return trainer


def train(job: Job) -> float:
    trainer = make_trainer(job)
    trainer.train(job.loader.dataset, num_epochs=job.epochs, per_device_batch_size=job.batch_size)
    return float(trainer.run_history.get_latest_metric("train_loss_epoch"))


def evaluate(job: Job) -> float:
    trainer = make_trainer(job)
    trainer.evaluate(job.loader.dataset, per_device_batch_size=job.batch_size)
    return float(trainer.run_history.get_latest_metric("evaluation_loss"))


RUNS = {"train": train, "evaluate": evaluate}
