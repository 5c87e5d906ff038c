"""Contrastive learning: embeddings of two kinds, accuracy, predictions, and mistakes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Pair
from ptacc.errors import DataError, OptionError
from ptacc.trainers import ContrastiveTrainer
from tests.trainers.cases import make_inputs


class TwoEncoders(ContrastiveTrainer[nn.ModuleList]):
    @override
    def embed(self, batch: Pair) -> tuple[Tensor, Tensor]:
        first, second = (encoder(part) for encoder, part in zip(self.model, batch, strict=True))
        return first, second


def make(trainer: type[ContrastiveTrainer], model: nn.Module, temperature: float = 0.1) -> ContrastiveTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer(model, optimizer=optimizer, temperature=temperature, default_callbacks=())


def test_accuracy_is_the_share_of_parts_whose_other_part_is_nearest() -> None:
    model, first, second = nn.Identity(), make_inputs(8), make_inputs(8) + make_inputs(3, 8)[:, 0].roll(1, 0)
    trainer = ContrastiveTrainer(
        model, optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)]), default_callbacks=()
    )
    nearest = (normalize(first) @ normalize(second).T).argmax(dim=1)
    output = trainer.train_step((first, second))
    assert output.logged["accuracy"] == (nearest == torch.arange(24)).double().mean()


def test_predictions_are_normalised_embeddings_of_inputs_or_of_first_parts() -> None:
    trainer = make(ContrastiveTrainer, nn.Linear(4, 2).double())
    expected = normalize(trainer.model(make_inputs())).detach()
    torch.testing.assert_close(torch.stack(trainer.predict(list(make_inputs()))), expected)
    torch.testing.assert_close(torch.stack(trainer.predict(TensorDataset(make_inputs(), make_inputs()))), expected)


def test_parts_of_different_kinds_have_their_own_encoders() -> None:
    data = TensorDataset(make_inputs(), make_inputs(6))
    trainer = make(TwoEncoders, nn.ModuleList([nn.Linear(4, 3), nn.Linear(6, 3)]).double())
    history = trainer.train(data, data, num_epochs=2)
    assert history[-1].train_loss < history[0].train_loss
    assert history[-1].metrics.keys() == {"accuracy"}


def test_parts_of_different_shapes_need_an_embedding_of_their_own() -> None:
    data = TensorDataset(make_inputs(), make_inputs(6))
    with pytest.raises(DataError, match=r"shapes \(8, 4\) and \(8, 6\). Override embed\(\)"):
        make(ContrastiveTrainer, nn.Linear(4, 2).double()).train(data, num_epochs=1)


def test_batches_that_are_not_pairs_are_refused() -> None:
    with pytest.raises(DataError, match=r"must be two tensors, and the data gives a \w+ of \(Tensor\)"):
        make(ContrastiveTrainer, nn.Linear(4, 2).double()).train(TensorDataset(make_inputs()), num_epochs=1)


def test_the_temperature_is_above_zero() -> None:
    with pytest.raises(OptionError, match="temperature=0"):
        make(ContrastiveTrainer, nn.Linear(4, 2), temperature=0)
