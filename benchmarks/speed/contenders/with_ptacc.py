"""ptacc: without mixins, with its default callbacks, and with eight mixins."""

from torch.optim import Optimizer

from benchmarks.speed.jobs import SEED, Job
from ptacc import (
    AMPMixin,
    CheckpointMixin,
    EarlyStoppingMixin,
    Epochs,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    PrintMetrics,
    ProgressBar,
    RunPlan,
    SeedMixin,
    StopOnNonFinite,
    Trainer,
)
from ptacc.protocols import LRSchedulerLike


class Composed(
    SeedMixin,
    AMPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    EarlyStoppingMixin,
    CheckpointMixin,
    Trainer,
): ...


class Seeded(SeedMixin, Trainer): ...


class Saving(CheckpointMixin, Trainer): ...


def train(job: Job) -> float:
    trainer = Trainer(job.model, loss_func=job.loss_func, optimizer=job.optimizer, default_callbacks=())
    return trainer.train(job.loader, num_epochs=job.epochs)[-1].train_loss


def train_with_callbacks(job: Job) -> float:
    # Show the progress bar, which is disabled by default without a terminal, to include its cost.
    callbacks = (StopOnNonFinite(), ProgressBar(shown=True), PrintMetrics())
    trainer = Trainer(job.model, loss_func=job.loss_func, optimizer=job.optimizer, default_callbacks=callbacks)
    return trainer.train(job.loader, num_epochs=job.epochs)[-1].train_loss


def train_composed(job: Job) -> float:
    from torchmetrics.classification import (
        MulticlassAccuracy,
    )  # excluded from the time to the first step of a plain trainer

    def schedule(optimizer: Optimizer, _plan: RunPlan) -> LRSchedulerLike:
        return job.make_schedule(optimizer)

    trainer = Composed(
        job.model,
        loss_func=job.loss_func,
        optimizer=job.optimizer,
        default_callbacks=(),
        seed=SEED,
        mixed_precision="no",
        gradient_accumulation_steps=1,
        create_scheduler=schedule,
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
        early_stopping_patience=100,
        checkpoint_dir=job.folder,
        checkpoint_every=None,
    )
    return trainer.train(job.loader, job.eval_loader, num_epochs=job.epochs)[-1].train_loss


def train_in_memory(job: Job) -> float:
    trainer = Seeded(job.model, loss_func=job.loss_func, optimizer=job.optimizer, default_callbacks=(), seed=SEED)
    history = trainer.train(job.dataset, num_epochs=job.epochs, per_device_batch_size=job.batch_size)
    return history[-1].train_loss


def evaluate(job: Job) -> float:
    trainer = Trainer(job.model, loss_func=job.loss_func, optimizer=job.optimizer, default_callbacks=())
    return trainer.evaluate(job.loader).loss


def train_and_save(job: Job) -> float:
    trainer = Saving(
        job.model,
        loss_func=job.loss_func,
        optimizer=job.optimizer,
        default_callbacks=(),
        checkpoint_dir=job.folder,
        checkpoint_every=Epochs(1),
        keep_last=1,
    )
    return trainer.train(job.loader, num_epochs=job.epochs)[-1].train_loss


RUNS = {
    "train": train,
    "evaluate": evaluate,
    "callbacks": train_with_callbacks,
    "composed": train_composed,
    "in-memory": train_in_memory,
    "two-processes": train,
    "saves": train_and_save,
}
