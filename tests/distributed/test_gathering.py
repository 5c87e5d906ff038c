"""Contrastive losses over the rows of all processes: the numbers of one process with the whole batch."""

from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim import SGD
from typing_extensions import override

from ptacc import DDPMixin, FSDPMixin, Pair, StepOutput, TensorParallelMixin, Trainer, TrainingLoop
from ptacc.errors import DataError
from ptacc.testing import tiny_parts
from tests.ranks import run_ranks

BATCH, SAMPLES, STEPS = 12, 26, 6
"""The last batch of an epoch has two samples: of three processes, one gets padding."""
Numbers = tuple[list[float], float, dict[str, Tensor]]
"""The losses of the steps, the loss of an evaluation, the weights."""


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = nn.Linear(5, 4), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.scale = nn.Parameter(torch.tensor([2.0]))

    @override
    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * normalize(self.images(images)), normalize(self.texts(texts))


def plain_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Return the loss of CLIP on one process."""
    targets = torch.arange(len(images))
    return cross_entropy(images @ texts.T, targets) + cross_entropy(texts @ images.T, targets)


class OwnRows(TrainingLoop[Pair, Tensor]):
    """Compares this rank's rows with all rows."""

    default_callbacks: Any = ()

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        images, texts = self.model(*batch)
        (all_images, own), (all_texts, _) = self.gather_with_grad(images), self.gather_with_grad(texts)
        loss = cross_entropy(images @ all_texts.T, own) + cross_entropy(texts @ all_images.T, own)
        return StepOutput(loss=loss, outputs=images)


class AllRows(OwnRows):
    """Computes the loss of all rows on each rank."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        images, texts = self.model(*batch)
        all_images, _ = self.gather_with_grad(images)
        all_texts, _ = self.gather_with_grad(texts)
        return StepOutput(loss=plain_loss(all_images, all_texts), outputs=images)


def make() -> tuple[Towers, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Towers().double()
    images, texts = torch.randn(SAMPLES, 5).double(), torch.randn(SAMPLES, 3).double()
    return model, list(zip(images, texts, strict=True))


def train(kind: type[OwnRows], steps: int = STEPS, **options: Any) -> Numbers:
    model, data = make()
    trainer = kind(model, optimizer=SGD(model.parameters(), lr=0.5), **options)
    size = BATCH // trainer.distributed.replicas
    history = trainer.train(
        data, max_steps=steps, per_device_batch_size=size, train_dataloader_kwargs={"shuffle": False}
    )
    evaluated = trainer.evaluate(data, per_device_batch_size=size).loss
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return [step.loss for step in history.steps], evaluated, weights


def test_one_process_trains_as_a_plain_loop() -> None:
    model, data = make()
    optimizer, losses = SGD(model.parameters(), lr=0.5), []
    for start in (0, 12, 24) * 2:
        loss = plain_loss(*model(*map(torch.stack, zip(*data[start : start + BATCH], strict=True))))
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    trained, _, weights = train(OwnRows)
    assert trained == losses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


class WithDDP(DDPMixin, OwnRows): ...


class WithFSDP(FSDPMixin, OwnRows): ...


class WithTensorParallel(TensorParallelMixin, FSDPMixin, OwnRows):
    tensor_parallel_size: int | None = 2
    tensor_parallel_plan: Any = field(default_factory=lambda: {"texts.0": "colwise", "texts.2": "rowwise"})


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        (OwnRows, 2),
        (OwnRows, 3),
        (AllRows, 1),
        (AllRows, 3),
        (WithDDP, 2),
        (WithFSDP, 2),
        (WithTensorParallel, 2),
        pytest.param(WithTensorParallel, 4, marks=pytest.mark.prove),
    ],
)
def test_processes_train_and_evaluate_as_one_process(kind: type[OwnRows], world_size: int) -> None:
    losses, evaluated, weights = train(OwnRows)
    for numbers in run_ranks(train, world_size, kind):
        assert numbers[0] == pytest.approx(losses, rel=1e-12)
        assert numbers[1] == pytest.approx(evaluated, rel=1e-12)
        torch.testing.assert_close(numbers[2], weights, rtol=1e-12, atol=1e-14)


class Partial(OwnRows):
    """Has a parameter that gets a gradient on one rank only, after the gathering."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        used = self.model.get_parameter("bias").square().sum() if self.distributed.rank == 1 else 0.0
        return StepOutput(loss=output.loss + used, outputs=output.outputs)


def train_partial() -> Tensor:
    model, data = make()
    model.register_parameter("bias", nn.Parameter(torch.ones(3).double()))
    trainer = Partial(model, optimizer=SGD(model.parameters(), lr=0.5))
    trainer.train(data, max_steps=2, per_device_batch_size=6)
    return model.get_parameter("bias").detach()


def test_gradients_are_sent_after_a_backward_pass_with_collectives() -> None:
    first, second = run_ranks(train_partial, 2)
    assert torch.equal(first, second)
    assert (first < 1).all()


def gather_outside_of_steps() -> tuple[list[float], list[int], list[float]]:
    trainer = OwnRows(Towers(), optimizer=SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    rank = trainer.distributed.rank
    rows = torch.full((rank, 1), 10.0 * rank).requires_grad_()
    gathered, own = trainer.gather_with_grad(rows)
    (gathered.square().sum() * (rank + 1)).backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    return gathered.flatten().tolist(), own.tolist(), rows.grad.flatten().tolist()


def test_numbers_of_rows_may_differ_and_gradients_are_summed_over_ranks() -> None:
    results = run_ranks(gather_outside_of_steps, 3)
    assert [gathered for gathered, _, _ in results] == [[10.0, 20.0, 20.0]] * 3
    assert [own for _, own, _ in results] == [[], [0], [1, 2]]
    assert [gradients for _, _, gradients in results] == [[], [120.0], [240.0, 240.0]]


@pytest.mark.parametrize("shapes", [[(), ()], [(2, 3), (2, 4)]])
def test_tensors_that_cannot_be_concatenated_are_refused_on_all_ranks(shapes: list[tuple[int, ...]]) -> None:
    def gather() -> str:
        trainer = Trainer(**tiny_parts())
        with pytest.raises(DataError, match=r"gather_with_grad\(\)") as refused:
            trainer.gather_with_grad(torch.ones(shapes[trainer.distributed.rank]))
        return str(refused.value)

    said = run_ranks(gather, 2)
    assert said[0] == said[1]
