import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import EMAMixin, GradAccumMixin, RestoreBestWeights, StepResult, Trainer
from ptacc.mixins.ema import EMA_STATE
from ptacc.model.averaging import AveragedWeights
from ptacc.testing import tiny_data, tiny_parts


class Averaged(GradAccumMixin, EMAMixin, Trainer): ...


def train(**options: Any) -> tuple[Averaged, list[dict[str, Tensor]]]:
    """Train, and return the weights before and after each step."""
    recorded: list[dict[str, Tensor]] = []

    class Watched(Averaged):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            recorded.append(copy.deepcopy(dict(self.unwrapped_model.state_dict())))

    trainer = Watched(**tiny_parts(), **options)
    recorded.append(copy.deepcopy(dict(trainer.model.state_dict())))
    trainer.train(tiny_data(), tiny_data(), num_epochs=2)
    return trainer, recorded


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_average_is_updated_once_per_step(accumulation: int) -> None:
    trainer, recorded = train(ema_decay=0.9, gradient_accumulation_steps=accumulation)
    expected = recorded[0]["weight"]
    for weights in recorded[1:]:
        expected = 0.9 * expected + 0.1 * weights["weight"]
    torch.testing.assert_close(trainer.run[EMA_STATE].tensors["weight"], expected, rtol=1e-12, atol=0)
    assert trainer.run[EMA_STATE].updates == trainer.progress.steps


def test_evaluation_uses_the_average_and_training_does_not() -> None:
    trainer, recorded = train(ema_decay=0.9)
    assert torch.equal(trainer.model.state_dict()["weight"], recorded[-1]["weight"])
    with trainer.averaged_weights():
        averaged = float(
            nn.functional.cross_entropy(trainer.model(tiny_data().tensors[0]), tiny_data().tensors[1]).detach()
        )
    assert trainer.history[-1].eval_loss == pytest.approx(averaged, rel=1e-12)
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(averaged, rel=1e-12)
    assert torch.equal(trainer.model.state_dict()["weight"], recorded[-1]["weight"])


def test_with_ema_evaluates_false_evaluation_uses_the_weights() -> None:
    trainer, _ = train(ema_decay=0.9, ema_evaluates=False)
    plain = Trainer(**tiny_parts())
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate(tiny_data()).loss == plain.evaluate(tiny_data()).loss


def test_floating_buffers_are_averaged_and_integers_copied() -> None:
    model = nn.BatchNorm1d(2)
    averages = AveragedWeights(model)
    assert model.running_mean is not None
    model.running_mean.fill_(1.0)
    model(torch.randn(4, 2))
    mean = model.running_mean.clone()
    averages.update(model, weight=0.25)
    torch.testing.assert_close(averages.tensors["running_mean"], 0.25 * mean)
    assert int(averages.tensors["num_batches_tracked"]) == 1


def test_swapping_twice_restores_the_weights() -> None:
    model = nn.Linear(3, 2)
    averages, before = AveragedWeights(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.weight.add_(1)
    raw = copy.deepcopy(model.state_dict())
    with averages.applied(model):
        assert torch.equal(model.weight, before["weight"])
    assert torch.equal(model.weight, raw["weight"])


def test_an_exception_in_the_block_restores_the_weights() -> None:
    model = nn.Linear(3, 2)
    averages = AveragedWeights(model)
    with torch.no_grad():
        model.weight.add_(1)
    raw = model.weight.detach().clone()
    with pytest.raises(KeyError), averages.applied(model):
        raise KeyError
    assert torch.equal(model.weight, raw)


def test_a_model_with_batch_norm_trains_with_averages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    data = TensorDataset(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in tiny_data().tensors))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Averaged(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, ema_decay=0.5, default_callbacks=())
    history = trainer.train(data, data, num_epochs=5)
    first, last = history[0].eval_loss, history[-1].eval_loss
    assert first is not None
    assert last is not None
    assert last < first


def test_an_evaluation_within_averaged_weights_uses_them() -> None:
    trainer, _ = train(ema_decay=0.9)
    expected = trainer.evaluate(tiny_data()).loss
    with trainer.averaged_weights():
        assert trainer.evaluate(tiny_data()).loss == expected
        with trainer.averaged_weights():
            pass
        assert trainer.evaluate(tiny_data()).loss == expected
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss != expected


def test_the_best_model_is_the_one_that_was_evaluated() -> None:
    trainer = Averaged(**tiny_parts(), ema_decay=0.5, callbacks=[RestoreBestWeights("eval_loss", mode="max")])
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=3)
    best = max(epoch.eval_loss for epoch in history if epoch.eval_loss is not None)
    assert best == history[0].eval_loss
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(best, rel=1e-12)
    trainer.ema_evaluates = False
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(best, rel=1e-12)
