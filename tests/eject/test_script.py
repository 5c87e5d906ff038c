"""A script is formatted, says what it leaves out, and has the user's own losses."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from typing_extensions import override

import ptacc
import ptacc.eject
from ptacc import (
    BatchMixin,
    CheckpointMixin,
    EMAMixin,
    GradAccumMixin,
    LRSchedulerMixin,
    Mixin,
    MultiUpdateLoop,
    OptimizerDict,
    Pair,
    RestoreBestWeights,
    StepOutput,
    StepResult,
    StopOnNonFinite,
    SWAMixin,
    Throughput,
    Trainer,
    TrainingLoop,
)
from ptacc.eject.catalog import LEFT_OUT, MIXINS
from ptacc.eject.command import make_target
from ptacc.eject.script import make_script
from ptacc.errors import OptionError
from tests.eject.compositions import (
    CASES,
    RecordedLoss,
    assert_equal,
    eject,
    load_script,
    make_net,
    make_optimizer,
    make_trainer,
    run_script,
    train,
)

SCALE = 0.5


def scaled(loss: Tensor) -> Tensor:
    return loss * SCALE  # of the module


class Smoothed(Trainer):
    smoothing: float = 0.25

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss with smoothed labels."""
        return scaled(cross_entropy(outputs, targets, label_smoothing=self.smoothing))


class Autoencoder(GradAccumMixin, TrainingLoop[Pair, Tensor]):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, _ = batch
        outputs = self.model(inputs)  # three columns
        return StepOutput(loss=mse_loss(outputs, inputs[:, :3]), outputs=outputs)


class Weighted(EMAMixin, SWAMixin, Trainer):
    ema_decay: float = 0.9

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * (self.ema_decay + (self.swa_start or 0))


class Summing(Trainer):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        outputs = self.model(batch[0])
        return StepOutput.from_sum(outputs.sum(), outputs=outputs)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)


class Alternating(MultiUpdateLoop[Pair, Tensor]): ...


class Scheduled(LRSchedulerMixin, EMAMixin, Trainer): ...


def script_of(cls: Any) -> str:
    return make_script(make_target(f"tests:{cls.__name__}", cls))


def test_every_mixin_is_in_scripts_or_is_left_out_with_a_reason() -> None:
    public = {value for value in vars(ptacc).values() if isinstance(value, type) and issubclass(value, Mixin)}
    assert MIXINS.keys().isdisjoint(LEFT_OUT)
    assert {*MIXINS, *LEFT_OUT} == public - {Mixin, BatchMixin}
    assert {CASES[case][0] for case in CASES} == set(MIXINS)


@pytest.mark.parametrize("mixin", MIXINS, ids=lambda mixin: mixin.__name__)
def test_every_option_of_a_mixin_in_scripts_is_read(mixin: Any) -> None:
    source = "".join(path.read_text() for path in Path(str(ptacc.eject.__file__)).parent.glob("*.py"))
    own = {option.name for option in fields(mixin) if option.init} - {option.name for option in fields(Trainer)}
    assert [name for name in own if f'"{name}"' not in source] == []


@pytest.mark.parametrize("cases", [(), *((case,) for case in CASES), tuple(CASES)], ids="+".join)
def test_scripts_pass_ruff(cases: tuple[str, ...], tmp_path: Path) -> None:
    different = {CASES[case][0]: case for case in cases}
    callbacks = [StopOnNonFinite(), RestoreBestWeights("eval_loss")] if "swa" not in cases else []
    file = tmp_path / "script.py"
    file.write_text(eject(make_trainer(different.values(), RecordedLoss(), callbacks=callbacks)))
    for command in (["check"], ["check", "--select", "B,E,F,I,RUF,UP"], ["format", "--diff"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "--isolated", file], check=True, timeout=60)


def test_a_script_does_not_import_this_library() -> None:
    assert "import ptacc" not in eject(make_trainer(CASES, RecordedLoss()))
    assert "from ptacc" not in script_of(Scheduled)


@pytest.mark.parametrize("cls", [Smoothed, Autoencoder], ids=lambda cls: cls.__name__)
def test_the_losses_of_a_class_are_copied(cls: type[TrainingLoop[Any, Any]], tmp_path: Path) -> None:
    net = make_net()
    loss = {"loss_func": cross_entropy} if issubclass(cls, Trainer) else {}
    options: dict[str, Any] = {"optimizer": make_optimizer(net), "default_callbacks": (), **loss}
    trainer = cls(net, **options)
    script = load_script(eject(trainer), tmp_path)
    assert_equal(run_script(script, []), train(trainer, []))


def test_a_copy_keeps_comments_and_names_options_as_constants() -> None:
    source = script_of(Smoothed)
    assert "# Smoothed\nSMOOTHING = 0.25\n" in source
    assert "    return loss * SCALE  # of the module\n" in source
    assert "label_smoothing=SMOOTHING" in source


def test_options_of_mixins_in_own_losses_are_constants_of_the_mixins() -> None:
    source = script_of(Weighted)
    assert source.count("\nEMA_DECAY = 0.9\n") == 1
    assert "\n# Weighted\nSWA_START = None\n" in source
    assert "    return cross_entropy(outputs, targets) * (EMA_DECAY + (SWA_START or 0))\n" in source


def test_a_step_that_cannot_be_copied_is_to_write() -> None:
    source = " ".join(script_of(Summing).split())
    assert "To write: `make_model`, `make_optimizer`, `make_datasets`, `loss_func`, `train_step`." in source
    assert "`Summing.train_step` is not copied: train_step uses StepOutput.from_sum. Write `train_step`." in source
    assert "Hooks of `Summing` are left out: `on_step_end`." in source


def test_options_of_a_class_without_a_default_are_to_write() -> None:
    source = script_of(Scheduled)
    assert "\nEMA_DECAY = ...\n" in source
    assert "`create_scheduler`" in source.partition("Differences")[0]


def test_what_is_left_out_says_what_to_use() -> None:
    class Saving(CheckpointMixin, Trainer): ...

    assert "- `CheckpointMixin` is left out: a run does not resume." in script_of(Saving)


def test_with_fp16_a_step_that_the_scaler_skips_is_not_counted(tmp_path: Path) -> None:
    trainer = make_trainer(("bf16", "clamped", "accumulated", "scheduled"), RecordedLoss())
    trainer.mixed_precision = "fp16"  # type: ignore[attr-defined]
    file = tmp_path / "script.py"
    file.write_text(eject(trainer))
    counted = file.read_text().partition("            if not accelerator.optimizer_step_was_skipped:\n")[2]
    assert counted.startswith("                losses.append(step_loss)\n")
    assert "                scheduler.step()\n" in counted
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "--isolated", file], check=True, timeout=60)


def test_submodules_in_eval_mode_and_unused_callbacks_are_named() -> None:
    trainer = make_trainer((), RecordedLoss(), callbacks=[RestoreBestWeights("eval_loss", restore=False), Throughput()])
    trainer.model.get_submodule("tail").eval()
    source = " ".join(eject(trainer).split())
    assert "- Submodules that are in eval mode are trained: `tail`." in source
    assert "- `RestoreBestWeights(restore=False)` is left out." in source
    assert "- The callback `Throughput` is left out." in source


def test_parts_of_torch_are_written_with_their_arguments() -> None:
    net = make_net()
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    source = eject(Trainer(net, loss_func=loss, optimizer=torch.optim.AdamW(net.parameters(), lr=0.02)))
    assert "    return torch.optim.AdamW(model.parameters(), lr=0.02)\n" in source
    assert "\nloss_func = nn.CrossEntropyLoss(label_smoothing=0.1)\n" in source


def test_several_updates_and_optimizers_are_errors() -> None:
    net = make_net()
    halves = {"low": net.block, "high": net.head}
    both = OptimizerDict({name: make_optimizer(half) for name, half in halves.items()})
    with pytest.raises(OptionError, match="a MultiUpdateLoop have several updates"):
        script_of(Alternating)
    with pytest.raises(OptionError, match="it has the optimizers low, high"):
        eject(Trainer(net, loss_func=cross_entropy, optimizer=both))


def test_a_scheduler_that_takes_values_steps_after_the_evaluation() -> None:
    step = '        scheduler.step(values["train_loss"])\n'
    assert step in eject(make_trainer(("scheduled by values",), RecordedLoss()))
    assert step not in eject(make_trainer(("scheduled",), RecordedLoss()))


class Named(Trainer):
    weights: float = 1.0

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * self.weights


def train_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return evaluate(outputs) + targets.sum()


def evaluate(outputs: Tensor) -> Tensor:
    return outputs.sum()


def test_a_name_that_a_script_has_for_something_else_is_an_error() -> None:
    net = make_net()
    trainer = Trainer(net, loss_func=train_loss, optimizer=make_optimizer(net))
    with pytest.raises(OptionError, match="a script defines `evaluate`, and so would a copy of your code"):
        eject(trainer)
    with pytest.raises(OptionError, match="a script defines `WEIGHTS`"):
        script_of(Named)


def test_mixins_that_change_nothing_are_named() -> None:
    class Idle(GradAccumMixin, Trainer): ...

    assert "with the options that they have: `GradAccumMixin`." in " ".join(script_of(Idle).split())


def test_the_guide_names_the_mixins_of_scripts() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "eject.md").read_text(encoding="utf-8")
    assert [mixin.__name__ for mixin in (*MIXINS, *LEFT_OUT) if f"`{mixin.__name__}`" not in guide] == []
