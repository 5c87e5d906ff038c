"""Runs of a random composition, each in processes of its own: uninterrupted, killed and resumed."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    CheckpointMixin,
    EarlyStoppingMixin,
    EMAMixin,
    Epochs,
    EvalResult,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    OptimizerDict,
    RestoreBestWeights,
    SeedMixin,
    StepResult,
    Steps,
    SWAMixin,
    TrainerCore,
)
from ptacc.rng import RandomStreams
from ptacc.types.protocols import Stateful
from tests.fuzz.cases import Case
from tests.fuzz.data import DATASETS, OWN_BATCHES, READY, tensors
from tests.fuzz.parts import CLASSES, MAX_NORM, MAX_VALUE, SCHEDULES, make_model, make_optimizers
from tests.fuzz.trainers import Batch, FreezeForAnEpoch, Killed, RecordingTrainer, RecordingUpdates
from tests.ranks import run_ranks
from tests.records import timeless

OPTIONS: dict[str, tuple[type[TrainerCore], dict[str, Any]]] = {
    "ema": (EMAMixin, {"ema_decay": 0.8}),
    "swa": (SWAMixin, {"swa_start": 1}),
    "clip_norm": (GradClipMixin, {"max_grad_norm": MAX_NORM}),
    "clip_value": (GradClipMixin, {"max_grad_value": MAX_VALUE}),
    "skip_spikes": (GradClipMixin, {"max_loss_deviations": 0.5, "spike_action": "skip"}),
    "bf16": (AMPMixin, {"mixed_precision": "bf16"}),
    "early_stopping": (EarlyStoppingMixin, {"early_stopping_monitor": "loss", "early_stopping_patience": 2}),
}

ACCUMULATION: dict[str, Any] = {
    "none": None,
    "epochs": {Epochs(1): 3, Epochs(2): 1},
    "steps": {Steps(1): 3, Steps(2): 2},
}


class CountSteps(Callback[TrainerCore]):
    """Has a state, and counts events."""

    def __init__(self, killed: Killed) -> None:
        self.killed, self.steps, self.evaluations = killed, 0, 0

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self.killed.event()
        self.steps += 1

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        self.killed.event()
        self.evaluations += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps, "evaluations": self.evaluations}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.evaluations = state["steps"], state["evaluations"]


@cache
def composed(mixins: frozenset[type[TrainerCore]], loop: type[TrainerCore]) -> type[Any]:
    drawn: list[type] = sorted(mixins, key=lambda mixin: mixin.__name__)
    bases: list[type] = [CheckpointMixin, GradAccumMixin, SeedMixin, *drawn, loop]
    return type("Composed", tuple(bases), {})


@dataclass
class End:
    """What a run ended with, on one rank, apart from the clock."""

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    states: dict[str, Any]
    callback: dict[str, int]
    random: dict[str, Any]
    reason: str | None
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    predictions: list[Tensor]


@dataclass
class Outcome:
    """An uninterrupted run, on one rank.

    Args:
        end: What it ended with.
        events: Number of events.
        batches: The batches of each step.
        random: State of torch's generator before the first step.
        planned_steps: The length of the run for schedules, None if it is unknown.
        changed: What the run left changed.
        explained: The text of `explain()`.
    """

    end: End
    events: int
    batches: list[list[Batch]]
    random: Tensor
    planned_steps: int | None
    changed: list[str]
    explained: str


class Streams(Callback[TrainerCore]):
    """Keeps the states of the global generators at both ends of a run."""

    def __init__(self) -> None:
        self.start, self.end = torch.get_rng_state(), dict[str, Any]()

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.start = torch.get_rng_state()

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self.end = RandomStreams().state_dict()


def make_trainer(case: Case, directory: Path, killed: Killed, callbacks: Sequence[Callback[Any]]) -> Any:
    model = make_model(case.model)
    if "bf16" in case.mixins:
        model.float()
    optimizers = make_optimizers(model, case.optimizer, several=case.updates != "one")
    loop = RecordingUpdates if case.updates == "alternating" else RecordingTrainer
    chosen = [OPTIONS[name] for name in case.mixins if name in OPTIONS]
    options: dict[str, Any] = {}
    for _, given in chosen:
        options |= given
    mixins = {mixin for mixin, _ in chosen}
    if "metrics" in case.mixins:
        mixins.add(MetricsMixin)
        options["metrics"] = {"accuracy": MulticlassAccuracy(CLASSES)}
    watching: list[Callback[Any]] = [RestoreBestWeights(monitor(case))] if "best" in case.mixins else []
    if "early_stopping" in case.mixins:
        options["early_stopping_monitor"] = monitor(case)
    if SCHEDULES[case.schedule] is not None:
        mixins.add(LRSchedulerMixin)
        options["create_scheduler"] = SCHEDULES[case.schedule]
    if case.schedule == "plateau":
        options["scheduler_monitor"] = monitor(case)
    if loop is RecordingTrainer:
        options["loss_func"] = nn.CrossEntropyLoss()
    if case.freeze_at:
        watching.append(FreezeForAnEpoch(model, case.freeze_at))
    return composed(frozenset(mixins), loop)(
        model,
        optimizer=optimizers["first"] if case.updates == "one" else OptimizerDict(optimizers),
        gradient_accumulation_steps=case.accumulation,
        accumulation_schedule=ACCUMULATION[case.accumulation_schedule],
        checkpoint_dir=directory / "run",
        checkpoint_every=Steps(case.save_every) if case.save_every else Epochs(1),
        checkpoint_in_background=case.in_background,
        keep_last=2,
        resume=True,
        seed=7,
        killed=killed,
        batches={},
        logs_values="logged" in case.mixins,
        default_callbacks=(),
        callbacks=[*callbacks, *watching],
        **options,
    )


def monitor(case: Case) -> str:
    return "eval_loss" if case.eval_sets == 1 else "first/loss"


def run_options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {name: getattr(case, name) for name in ("max_steps", "max_items")}
    options["num_epochs"] = case.epochs
    if case.evaluate_every:
        options["evaluate_every"] = Steps(case.evaluate_every)
    if case.data in READY | OWN_BATCHES:
        return options
    loading: dict[str, Any] = {"num_workers": case.workers, "drop_last": case.drop_last}
    if not case.data.endswith("stream"):
        loading["shuffle"] = case.shuffle
    return options | {"per_device_batch_size": case.batch, "train_dataloader_kwargs": loading}


def eval_data(case: Case) -> Any:
    sets = {"first": tensors(5, seed=11), "second": tensors(4, seed=12)}
    given: Any = [None, sets["first"], sets][case.eval_sets]
    if case.data not in READY | OWN_BATCHES or given is None:
        return given
    if isinstance(given, dict):
        return {name: DataLoader(data, 3) for name, data in given.items()}
    return DataLoader(given, 3)


def train(case: Case, directory: Path, at: int | None = None) -> Outcome:
    """Train, or resume, in this process; end the process at an event."""
    killed, streams = Killed(at), Streams()
    counting = CountSteps(killed)
    trainer = make_trainer(case, directory, killed, [counting, streams])
    data = DATASETS[case.data](samples=case.samples, batch=case.batch, workers=case.workers)
    before = fingerprint(trainer)
    explained = str(trainer.explain())
    torch.manual_seed(3)  # the run has its own seed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*swa_start=1\\): no weights were averaged")  # a run that ends in an epoch
        history = trainer.train(data, eval_data(case), **run_options(case))
    states = {key.name: state for key, state in trainer.run.states() if isinstance(state, Stateful)}
    trainer.model.eval()
    end = End(
        weights=trainer.model.state_dict(),
        optimizer=trainer.optimizer.state_dict(),
        states={name: state.state_dict() for name, state in states.items() if name != "checkpoints"},
        callback=counting.state_dict(),
        random=streams.end,
        reason=history.stop_reason,
        epochs=[timeless(asdict(epoch)) for epoch in history],
        steps=[timeless(asdict(step)) for step in history.steps],
        predictions=[trainer.model(tensors(3, seed=5).tensors[0].to(next(trainer.model.parameters()).dtype)).detach()],
    )
    after = fingerprint(trainer)
    changed = [name for name, value in after.items() if value != before[name]]
    return Outcome(
        end,
        killed.count,
        list(trainer.batches.values()),
        streams.start,
        trainer.run.plan.known_total_steps,
        changed,
        explained,
    )


def fingerprint(trainer: Any) -> dict[str, object]:
    """Describe what a run may not change."""
    model: nn.Module = trainer.model
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    groups = [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
    return {
        "modules": [(name, type(module).__qualname__) for name, module in model.named_modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "requires_grad": [(name, weight.requires_grad) for name, weight in model.named_parameters()],
        "gradients": [name for name, weight in model.named_parameters() if weight.grad is not None],
        "groups": [{name: float(v) if isinstance(v, Tensor) else v for name, v in group.items()} for group in groups],
        "forward": vars(model).get("forward"),
    }


def run_uninterrupted(case: Case, directory: Path) -> list[Outcome]:
    """Run on all ranks, and return the outcome of each."""
    return run_ranks(partial(train, case, directory), case.world_size, timeout=40)


def run_killed(case: Case, directory: Path, at: int) -> None:
    """Run, or resume, until one rank has been killed at an event. The other ranks end with an error."""

    def killed_on_one_rank() -> None:
        train(case, directory, at if int(os.environ["RANK"]) == case.killed_rank else None)

    run_ranks(killed_on_one_rank, case.world_size, timeout=40, may_die=range(case.world_size))
