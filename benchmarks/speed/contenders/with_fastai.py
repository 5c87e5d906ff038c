"""fastai's Learner, without logs, validation and progress bars."""

# pyright: reportMissingImports=false

from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from benchmarks.speed.jobs import Job


class NoValidation(Callback):
    def before_validate(self) -> None:
        raise CancelValidException


def make_learner(job: Job) -> Learner:
    return Learner(
        DataLoaders(job.loader, job.loader),
        job.model,
        loss_func=job.loss_func,
        opt_func=lambda _, **__: OptimWrapper(opt=job.optimizer),
        lr=job.optimizer.defaults["lr"],
        cbs=NoValidation(),
        path=job.folder,
    )


def train(job: Job) -> float:
    learner = make_learner(job)
    with learner.no_logging():
        learner.fit(job.epochs)
    return float(learner.recorder.values[-1][0])


def evaluate(job: Job) -> float:
    learner = make_learner(job)
    learner.remove_cb(NoValidation)
    with learner.no_logging():
        return float(learner.validate(dl=job.loader)[0])


RUNS = {"train": train, "evaluate": evaluate}
