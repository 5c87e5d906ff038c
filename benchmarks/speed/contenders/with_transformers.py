"""transformers' Trainer, without clipping, logs, saves and progress bars."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from typing_extensions import override

from benchmarks.speed.jobs import Job


class JobTrainer(Trainer):
    job: Job

    @override
    def get_train_dataloader(self) -> DataLoader[Any]:
        return prepare_loader(self, self.job.loader)

    @override
    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return prepare_loader(self, self.job.loader)

    @override
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(inputs[0])
        loss = self.job.loss_func(outputs, inputs[1])
        return (loss, outputs) if return_outputs else loss

    @override
    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            inputs = self._prepare_inputs(inputs)
            return self.compute_loss(model, inputs), None, None


def prepare_loader(trainer: Any, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Prepare the loader of the job as the trainer prepares its own."""
    return trainer.accelerator.prepare(loader)


def make_trainer(job: Job) -> JobTrainer:
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch_size,
        per_device_eval_batch_size=job.batch_size,
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    constant = LambdaLR(job.optimizer, lambda _: 1.0)  # the trainer always steps a schedule
    trainer = JobTrainer(job.model, arguments, train_dataset=job.loader.dataset, optimizers=(job.optimizer, constant))
    trainer.job = job
    return trainer


def train(job: Job) -> float:
    return float(make_trainer(job).train().training_loss)


def evaluate(job: Job) -> float:
    return float(make_trainer(job).evaluate(job.loader.dataset)["eval_loss"])


RUNS = {"train": train, "evaluate": evaluate}
