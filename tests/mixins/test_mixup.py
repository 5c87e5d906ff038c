from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import CheckpointMixin, GradAccumMixin, MixUpMixin, Pair, SeedMixin, StepOutput, Steps, Trainer, TrainingLoop
from ptacc.errors import CompositionError, DataError, OptionError
from ptacc.mixins.mixup import MIXING
from ptacc.rng import derive_seed
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

IN_ORDER: Any = {"train_dataloader_kwargs": {"shuffle": False}}


class Mixing(MixUpMixin, SeedMixin, GradAccumMixin, Trainer):
    mixup_classes: int | None = 2
    seed: int | None = 3


def share_of(end: int, *, epoch: int = 0, replica: int = 0, alpha: float = 0.4) -> float:
    return Random(derive_seed(3, MIXING, epoch, end, replica)).betavariate(alpha, alpha)


def mixed_loss(net: Callable[[Tensor], Tensor], batch: tuple[Tensor, ...], share: float) -> Tensor:
    """MixUp as in the paper's code: a weighted mean of the losses for both targets."""
    inputs, targets = batch
    outputs = net(share * inputs + (1 - share) * inputs.roll(1, 0))
    return share * cross_entropy(outputs, targets) + (1 - share) * cross_entropy(outputs, targets.roll(1, 0))


def losses(trainer: Trainer, **options: Any) -> list[float]:
    history = trainer.train(tiny_data(), per_device_batch_size=5, **{"num_epochs": 2} | IN_ORDER | options)
    return [step.loss for step in history.steps]


# ---- training


def test_mixup_equals_a_plain_loop() -> None:
    parts = tiny_parts()
    net, sgd, data = parts["model"], parts["optimizer"], tiny_data()
    expected = []
    for epoch in range(2):
        for start in range(0, len(data), 5):
            loss = mixed_loss(net, data[start : start + 5], share_of(min(start + 5, len(data)), epoch=epoch))
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            sgd.zero_grad()
            expected.append(loss.item())
    assert losses(Mixing(**tiny_parts(), mixup_alpha=0.4)) == pytest.approx(expected, rel=1e-12)


def test_batches_of_a_step_are_weighted_by_their_items() -> None:
    net, data = tiny_parts()["model"], tiny_data(7)
    trainer = Mixing(**tiny_parts(), mixup_alpha=0.4, gradient_accumulation_steps=2)
    (step,) = trainer.train(data, num_epochs=1, per_device_batch_size=5, **IN_ORDER).steps
    both = [mixed_loss(net, data[:5], share_of(5)), mixed_loss(net, data[5:], share_of(7))]
    assert step.loss == pytest.approx((5 * both[0].item() + 2 * both[1].item()) / 7)
    assert step.items == 7


def first_loss_of_a_rank() -> float:
    trainer = Mixing(**tiny_parts(), mixup_alpha=0.4)
    return trainer.train(tiny_data(8), num_epochs=1, per_device_batch_size=4, **IN_ORDER).steps[0].loss


@pytest.mark.timeout(60)
def test_each_process_mixes_its_own_batch() -> None:
    net, data = tiny_parts()["model"], tiny_data(8)
    of_ranks = [mixed_loss(net, data[slice(r * 4, r * 4 + 4)], share_of(8, replica=r)).item() for r in range(2)]
    assert run_ranks(first_loss_of_a_rank, 2) == [pytest.approx(sum(of_ranks) / 2)] * 2


class Saving(CheckpointMixin, Mixing): ...


def test_a_resumed_run_mixes_as_an_uninterrupted_one(tmp_path: Path) -> None:
    make = partial(Saving, resume=True, checkpoint_every=Steps(1), mixup_alpha=0.4, gradient_accumulation_steps=2)
    whole = losses(make(**tiny_parts(), checkpoint_dir=tmp_path / "whole"))
    losses(make(**tiny_parts(), checkpoint_dir=tmp_path / "parts"), max_steps=2)
    assert losses(make(**tiny_parts(), checkpoint_dir=tmp_path / "parts")) == whole


def test_evaluations_are_not_mixed() -> None:
    trainer = Mixing(**tiny_parts(), mixup_alpha=0.4)
    history = trainer.train(tiny_data(), tiny_data(), num_epochs=1)
    inputs, targets = tiny_data().tensors
    expected = cross_entropy(trainer.model(inputs), targets).item()
    assert history[-1].eval_loss == pytest.approx(expected)
    assert trainer.evaluate(tiny_data()).loss == pytest.approx(expected)


class RegressionLoop(TrainingLoop[Pair, Tensor, nn.Module, tuple[Tensor, ...]]):
    """Its `eval_step` is the default, which calls `train_step`."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        outputs: Tensor = self.model(batch[0])
        return StepOutput(loss=(outputs - batch[1]).square().mean(), outputs=batch[1])


class Regression(MixUpMixin, RegressionLoop): ...


def test_evaluations_with_train_step_are_not_mixed() -> None:
    net = nn.Linear(1, 1)
    data = TensorDataset(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None])
    trainer = Regression(
        net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), mixup_alpha=1.0, default_callbacks=()
    )
    trainer.train(data, data, num_epochs=1)
    assert torch.stack(trainer.predict(data)).flatten().tolist() == [0, 1, 2, 3]


# ---- mistakes


def test_class_indices_need_the_number_of_classes() -> None:
    with pytest.raises(DataError, match="Give mixup_classes"):
        losses(Mixing(**tiny_parts(), mixup_alpha=0.4, mixup_classes=None))


def test_cutmix_needs_images() -> None:
    with pytest.raises(DataError, match=r"cutmix_alpha needs images .* the shape \(5, 4\)"):
        losses(Mixing(**tiny_parts(), cutmix_alpha=1.0))


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.0}, {"cutmix_alpha": -1.0}, {"mixup_classes": 1}])
def test_options_out_of_range_raise(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Mixing(**tiny_parts(), **options)


def test_a_loss_that_weights_classes_raises() -> None:
    parts = tiny_parts()
    parts["loss_func"] = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
    with pytest.raises(OptionError, match="loss_func weights or ignores classes"):
        Mixing(**parts)


def test_a_loop_without_a_step_behind_the_mixin_raises() -> None:
    class NoStep(MixUpMixin, TrainingLoop[Pair, Tensor]): ...

    net = nn.Linear(1, 1)
    with pytest.raises(CompositionError, match="no class defines one"):
        NoStep(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
