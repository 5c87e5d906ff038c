"""Which mixins combine with which engine: the source of the matrix in the docs."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torchmetrics.classification import MulticlassAccuracy

import ptacc
from ptacc import DDPMixin, DeepSpeedMixin, Epochs, FSDPMixin, Mixin, SeedMixin, TensorParallelMixin, Trainer
from ptacc.errors import CompositionError, PtaccError
from tests.engines.nets import Block, digits, make, make_optimizer
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks
from tests.tracking.recorder import Recorder

pytestmark = [  # of DeepSpeed and dynamo themselves
    *DEEPSPEED,
    pytest.mark.filterwarnings("ignore:`torch.distributed.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace the builtin"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "engines.md"
ENGINES: Mapping[str, tuple[type[Mixin], dict[str, Any]]] = {
    "DDPMixin": (DDPMixin, {}),
    "FSDPMixin": (FSDPMixin, {}),
    "TensorParallelMixin": (TensorParallelMixin, {"tensor_parallel_plan": {"leave": "colwise_gather_output"}}),
    "ZeRO 2": (DeepSpeedMixin, {"zero_stage": 2}),
    "ZeRO 3": (DeepSpeedMixin, {"zero_stage": 3}),
}
PARTNERS: Mapping[str, dict[str, Any]] = {
    "AMPMixin": {"mixed_precision": "bf16"},
    "CheckpointMixin": {},
    "ClosureMixin": {},
    "CompileMixin": {"compile_backend": "eager"},
    "EMAMixin": {"ema_decay": 0.8},
    "EarlyStoppingMixin": {"early_stopping_monitor": "eval_loss", "early_stopping_patience": 1},
    "FreezeMixin": {"unfreeze_at": {"leave": Epochs(1)}},
    "GradAccumMixin": {"gradient_accumulation_steps": 2},
    "GradCheckpointMixin": {"gradient_checkpointing": [Block]},
    "GradClipMixin": {"max_grad_norm": 0.5, "max_grad_value": 0.1, "max_grad_deviations": 3.0},
    "LRSchedulerMixin": {"create_scheduler": lambda optimizer, plan: StepLR(optimizer, 2, 0.5)},
    "MetricsMixin": {"metrics": {"accuracy": MulticlassAccuracy(10)}},
    "MixUpMixin": {"mixup_alpha": 0.4, "mixup_classes": 10},
    "ProfilerMixin": {"profile_wait": 1, "profile_warmup": 1},
    "SWAMixin": {"swa_start": 1},
    "SeedMixin": {"seed": 4},
    "SyncBatchNormMixin": {},
    "TrackingMixin": {"trackers": [Recorder()]},
}
"""Every public mixin without an engine, with options under which it has an effect."""
YES, REFUSED = "yes", "no"
REFUSALS: Mapping[tuple[str, str], str] = {
    **{(engine, "ClosureMixin"): "ClosureMixin needs a replica of the model" for engine in [*ENGINES][1:]},
    **{(engine, "FreezeMixin"): "Leave DDPMixin and DeepSpeedMixin out" for engine in ("DDPMixin", "ZeRO 2", "ZeRO 3")},
    ("ZeRO 3", "CompileMixin"): "CompileMixin traces full parameters",
    ("ZeRO 3", "EMAMixin"): "EMAMixin averages or copies the weights",
    ("ZeRO 3", "SWAMixin"): "swa_start=1 averages or copies the weights",
}
"""Pairs that raise an error, with its message."""


def outcome(kind: type[Trainer], directory: Path, options: dict[str, Any]) -> list[float] | str:
    """Train a few steps; return the losses, or the message of the error."""
    model = make(has_batch_norm=True)
    usual: dict[str, Any] = {"optimizer": make_optimizer(model), "loss_func": nn.CrossEntropyLoss()}
    usual |= {"default_callbacks": ()}
    place: dict[str, Any] = {"checkpoint_dir": directory} if issubclass(kind, ptacc.CheckpointMixin) else {}
    try:
        trainer: Any = kind(model, **usual, **options, **place)
        size = 16 // trainer.distributed.replicas
        history = trainer.train(digits(101), digits(37), num_epochs=3, per_device_batch_size=size)
    except (PtaccError, CompositionError) as error:
        return str(error)
    evaluation = trainer.evaluate(digits(37), per_device_batch_size=size).loss
    weights = torch.stack([tensor.double().sum() for tensor in model.state_dict().values()]).sum().item()
    return [*(step.loss for step in history.steps), *(epoch.eval_loss or 0.0 for epoch in history), evaluation, weights]


def with_engine(engine: str, partner: str, directory: Path) -> list[float] | str:
    its_mixin, its_options = ENGINES[engine]
    bases, options = bases_and_options(partner)
    return outcome(type("WithEngine", (*bases, its_mixin, Trainer), {}), directory / "with", options | its_options)


def without(partner: str, directory: Path) -> list[float] | str:
    bases, options = bases_and_options(partner)
    return outcome(type("Without", (*bases, Trainer), {}), directory / "without", options)


def bases_and_options(partner: str) -> tuple[tuple[type[Mixin], ...], dict[str, Any]]:
    mixin = getattr(ptacc, partner)
    return (mixin,) if mixin is SeedMixin else (mixin, SeedMixin), {"seed": 4, **PARTNERS[partner]}


def test_every_public_mixin_is_in_the_matrix() -> None:
    public = {name for name, value in vars(ptacc).items() if isinstance(value, type) and issubclass(value, Mixin)}
    engines = {mixin.__name__ for mixin, _ in ENGINES.values()}
    assert public == {*engines, *PARTNERS, "Mixin", "BatchMixin"}


def test_two_engines_raise() -> None:
    for engine in (DDPMixin, FSDPMixin, TensorParallelMixin):
        with pytest.raises(CompositionError, match=rf"{engine.__name__} and DeepSpeedMixin both define make_engine"):
            type("Both", (engine, DeepSpeedMixin, Trainer), {})


@pytest.mark.parametrize("partner", sorted(PARTNERS))
@pytest.mark.parametrize(
    "engine",
    [name if name == "FSDPMixin" else pytest.param(name, marks=pytest.mark.prove) for name in ENGINES],
)
def test_a_pair_gives_the_numbers_of_replicas_or_raises(
    engine: str, partner: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if engine.startswith("ZeRO"):
        request.getfixturevalue("deepspeed_built")
    theirs, *_ = run_ranks(partial(without, partner, tmp_path), 1 if engine == "TensorParallelMixin" else 2)
    for mine in run_ranks(partial(with_engine, engine, partner, tmp_path), 2):
        if said := REFUSALS.get((engine, partner)):
            assert isinstance(mine, str)
            assert said in mine
        else:
            # A difference in the last bit of float32 may be one of bfloat16 a step later.
            assert mine == pytest.approx(theirs, rel=2e-2 if partner == "AMPMixin" else 1e-4)


def test_the_docs_show_the_matrix() -> None:
    rows = {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(\w+Mixin)` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    }
    expected = {
        partner: [REFUSED if (engine, partner) in REFUSALS else YES for engine in ENGINES] for partner in PARTNERS
    }
    assert rows == expected
