"""Everything composed, in each precision: what a plain loop with autocast and a gradient scaler ends with."""

import pytest
import torch

from ptacc.mixins.ema import EMA_STATE
from ptacc.protocols import Precision
from tests.gpu.parts import EPOCHS, WINDOWS, Plain, train

pytestmark = pytest.mark.usefixtures("deterministic")


def train_plainly(device: torch.device, precision: Precision) -> Plain:
    plain = Plain(device, precision)
    plain.train()
    return plain


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_weights_equal_a_plain_loops_to_the_last_bit(device: torch.device, precision: Precision) -> None:
    trainer, plain = train(precision), train_plainly(device, precision)
    for ours, theirs in zip(trainer.model.parameters(), plain.net.parameters(), strict=True):
        assert ours.device.type == theirs.device.type == device.type
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_stands_beside_a_step_follows_it(device: torch.device, precision: Precision) -> None:
    trainer, plain = train(precision), train_plainly(device, precision)
    norms = [step.logged["grad_norm"] for step in trainer.history.steps]
    torch.testing.assert_close(norms, [float(norm) for norm in plain.norms])
    averages = trainer.run[EMA_STATE].tensors
    for name, average in plain.average.named_parameters():
        torch.testing.assert_close(averages[name], average.detach())
    assert trainer.history[-1].evaluations[""].metrics["accuracy"] == pytest.approx(plain.accuracy())


def test_steps_that_the_scaler_skips_count_nowhere(device: torch.device) -> None:
    trainer, plain = train("fp16"), train_plainly(device, "fp16")
    assert 0 < plain.happened < EPOCHS * WINDOWS
    assert trainer.progress.steps == trainer.run[EMA_STATE].updates == plain.happened
    assert [step.step for step in trainer.history.steps] == list(range(1, plain.happened + 1))
    assert trainer.history.steps[-1].learning_rate == plain.rate
    assert trainer.progress.epochs == EPOCHS


def test_each_run_begins_with_the_same_factor(device: torch.device) -> None:
    once, twice = train("fp16"), train("fp16", runs=2)
    first, last = (trainer.run.engine.get_state().shared["scaler"]["scale"] for trainer in (once, twice))
    assert first == last < torch.amp.GradScaler(device.type).get_scale()
