"""The items of torch's losses, with a plain PyTorch loop over one batch of all samples as the reference."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from typing_extensions import override

from ptacc import GradAccumMixin, SeedMixin, StepOutput, Trainer, TrainingLoop
from ptacc.errors import DataError, OptionError
from ptacc.trainers.loss_items import LossItems
from tests.ranks import run_ranks

Pair = tuple[Tensor, Tensor]
WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


class Derived(nn.CrossEntropyLoss):
    """Has the forward of torch's loss."""


class DerivedElementwise(nn.MSELoss):
    """Has the forward of torch's loss."""


class Own(nn.CrossEntropyLoss):
    @override
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(input, target)


class OwnElementwise(nn.MSELoss):
    @override
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
    "smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=0, label_smoothing=0.1),
    "likelihood": nn.NLLLoss(weight=WEIGHTS),
    "partial": functools.partial(functional.cross_entropy, weight=WEIGHTS),
    "derived": Derived(weight=WEIGHTS, ignore_index=0),
    "own": Own(),
    "balanced": nn.CrossEntropyLoss(),
}


class Accumulating(SeedMixin, GradAccumMixin, Trainer):
    """Its order of samples is the same in each run: by chance, all targets of a batch could be ignored ones."""


def labelled(samples: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 3, (samples,), generator=generator))


class Sentences(Dataset[Pair]):
    """Sequences whose last targets are -100, of which torch's losses take no account."""

    def __len__(self) -> int:
        return 16

    @override
    def __getitem__(self, index: int) -> Pair:
        generator = torch.Generator().manual_seed(index)
        targets = torch.randint(0, 3, (6,), generator=generator)
        targets[1 + index % 6 :] = -100
        return torch.randn(3, 6, generator=generator, dtype=torch.float64), targets


def train(model: nn.Module, loss: str, data: Any, size: int, accumulation: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options: dict[str, Any] = {"loss_func": LOSSES[loss], "optimizer": optimizer, "default_callbacks": (), "seed": 0}
    trainer = Accumulating(model, gradient_accumulation_steps=accumulation, **options)
    evaluated = trainer.evaluate(data, per_device_batch_size=size).loss
    history = trainer.train(data, num_epochs=1, per_device_batch_size=size)
    return [evaluated, history[0].train_loss, *(p.sum().item() for p in model.parameters())]


def train_classifier(loss: str, size: int, accumulation: int) -> list[float]:
    torch.manual_seed(0)
    return train(nn.Linear(5, 3).double(), loss, labelled(), size, accumulation)


def train_tagger(size: int, accumulation: int) -> list[float]:
    torch.manual_seed(0)
    return train(nn.Conv1d(3, 3, 1).double(), "balanced", Sentences(), size, accumulation)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_of_several_batches_is_one_of_all_their_samples_with_weights_and_ignored_classes(loss: str) -> None:
    whole = train_classifier(loss, 16, 1)
    assert train_classifier(loss, 4, 4) == pytest.approx(whole, rel=1e-6)
    assert train_classifier(loss, 6, 3) == pytest.approx(whole, rel=1e-6)


def test_weighted_losses_are_the_same_on_two_processes() -> None:
    whole = train_classifier("smoothed", 16, 1)
    for split in run_ranks(train_classifier, 2, "smoothed", 4, 2):
        assert split == pytest.approx(whole, rel=1e-6)


def test_targets_that_are_ignored_do_not_count_wherever_batches_are_split() -> None:
    whole = train_tagger(16, 1)
    assert train_tagger(3, 6) == pytest.approx(whole, rel=1e-12)
    for split in run_ranks(train_tagger, 2, 3, 3):
        assert split == pytest.approx(whole, rel=1e-12)


def test_targets_on_a_device_are_not_read_if_each_sample_has_one() -> None:
    targets = torch.empty(4, dtype=torch.int64, device="meta")  # a read would raise
    assert LossItems(nn.CrossEntropyLoss()).count((torch.empty(4, 3, device="meta"), targets)) == 4


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_that_is_no_mean_is_refused_with_what_to_write(reduction: str) -> None:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(OptionError, match=rf"reduction='{reduction}', and must be a mean .*from_sum"):
        Trainer(model, loss_func=nn.MSELoss(reduction=reduction), optimizer=optimizer)


@pytest.mark.parametrize("loss", [Own(weight=WEIGHTS), Own(ignore_index=1), OwnElementwise(reduction="sum")])
def test_a_derived_loss_with_a_forward_of_its_own_needs_its_items_next_to_such_options(loss: nn.Module) -> None:
    class Counted(Trainer):
        @override
        def count_items(self, batch: Pair) -> float:
            return len(batch[1])

    model = nn.Linear(5, 3)
    parts: dict[str, Any] = {"loss_func": loss, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(OptionError, match=r"forward of its own.*Override count_items.*derive the loss from nn.Module"):
        Trainer(model, **parts)
    Counted(model, **parts)


def test_a_derived_loss_has_the_reduction_and_the_shapes_of_torchs() -> None:
    assert LossItems(Derived(reduction="sum")).reduction == "sum"
    assert LossItems(DerivedElementwise()).is_elementwise
    assert not LossItems(OwnElementwise()).is_elementwise
    assert not LossItems(Own(reduction="none")).is_undetermined  # its forward computes the mean by itself


class OwnLoss(Trainer):
    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().compute_train_loss(outputs, targets) + outputs.square().mean()


class OwnLossCounted(OwnLoss):
    @override
    def count_items(self, batch: Pair) -> float:
        return super().count_items(batch)


def test_an_own_loss_beside_a_weighted_one_needs_its_items() -> None:
    model = nn.Linear(5, 3).double()
    parts: dict[str, Any] = {"loss_func": LOSSES["weights"], "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(OptionError, match=r"a loss of its own.*return super\(\)\.count_items\(batch\)"):
        OwnLoss(model, **parts)
    OwnLossCounted(model, **parts).train(labelled(), num_epochs=1)


def test_a_class_per_sample_that_is_ignored_is_an_error_on_one_process_too() -> None:
    data = labelled()
    data.tensors[1][3] = -100
    model = nn.Linear(5, 3).double()
    trainer = Trainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DataError, match=r"8 samples holds 7 items.*int\(\(batch\[1\] != -100\)\.sum\(\)\)"):
        trainer.train(data, num_epochs=1)


class LabelLoop(TrainingLoop[dict[str, Tensor], Tensor]):
    @override
    def train_step(self, batch: dict[str, Tensor]) -> StepOutput[Tensor]:
        logits = self.model(batch["x"])
        return StepOutput(loss=functional.cross_entropy(logits, batch["labels"]), outputs=logits)


def test_labels_of_a_dictionary_that_losses_ignore_need_a_count() -> None:
    model = nn.Conv1d(3, 3, 1).double()
    loop = LabelLoop(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), default_callbacks=())
    data = [{"x": x, "labels": y} for x, y in (Sentences()[i] for i in range(16))]
    with pytest.raises(DataError, match=r'Override count_items.*int\(\(batch\["labels"\] != -100\)\.sum\(\)\)'):
        loop.train(data, num_epochs=1)
