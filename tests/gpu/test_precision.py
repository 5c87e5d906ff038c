"""In each precision, a composed trainer gives the results of a plain loop with autocast and a gradient scaler."""

import pytest
import torch

from ptacc.mixins.ema import EMA_STATE
from ptacc.protocols import Precision
from tests.gpu.parts import EPOCHS, WINDOWS, Plain, train

pytestmark = pytest.mark.usefixtures("deterministic")


def train_plainly(device: torch.device, precision: Precision, *, fused: bool = False) -> Plain:
    plain = Plain(device, precision, fused)
    plain.train()
    return plain


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_weights_equal_a_plain_loops_bit_for_bit(device: torch.device, precision: Precision, fused: bool) -> None:
    trainer, plain = train(precision, fused=fused), train_plainly(device, precision, fused=fused)
    for weight, expected in zip(trainer.model.parameters(), plain.net.parameters(), strict=True):
        assert weight.device.type == expected.device.type == device.type
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_norms_averages_and_metrics_equal_a_plain_loops(device: torch.device, precision: Precision) -> None:
    trainer, plain = train(precision), train_plainly(device, precision)
    norms = [step.logged["grad_norm"] for step in trainer.history.steps]
    torch.testing.assert_close(norms, [float(norm) for norm in plain.norms])
    averages = trainer.run[EMA_STATE].tensors
    for name, average in plain.average.named_parameters():
        torch.testing.assert_close(averages[name], average.detach())
    assert trainer.history[-1].evaluations[""].metrics["accuracy"] == pytest.approx(plain.accuracy())


def test_skipped_steps_are_not_counted(device: torch.device) -> None:
    trainer, plain = train("fp16"), train_plainly(device, "fp16")
    assert 0 < plain.completed < EPOCHS * WINDOWS
    assert trainer.progress.steps == trainer.run[EMA_STATE].updates == plain.completed
    assert [step.step for step in trainer.history.steps] == list(range(1, plain.completed + 1))
    assert trainer.history.steps[-1].learning_rate == plain.learning_rate
    assert trainer.progress.epochs == EPOCHS


def test_each_run_starts_with_the_same_loss_scale(device: torch.device) -> None:
    once, twice = train("fp16"), train("fp16", runs=2)
    first, last = (trainer.run.engine.get_state().shared["scaler"]["scale"] for trainer in (once, twice))
    assert first == last < torch.amp.GradScaler(device.type).get_scale()
