import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from ptacc import EpochRecord, SWAMixin, Trainer
from ptacc.testing import tiny_data, tiny_parts


class Averaged(SWAMixin, Trainer): ...


def test_the_run_ends_with_the_mean_of_its_last_epochs() -> None:
    seen: list[Tensor] = []

    class Watched(Averaged):
        @override
        def on_epoch_end(self, record: EpochRecord) -> None:
            super().on_epoch_end(record)
            seen.append(self.unwrapped_model.state_dict()["weight"].clone())

    trainer = Watched(**tiny_parts(), swa_start=2)
    trainer.train(tiny_data(), num_epochs=4)
    torch.testing.assert_close(trainer.model.state_dict()["weight"], sum(seen[1:], torch.zeros(())) / 3)


def test_without_a_start_nothing_is_averaged() -> None:
    plain, averaged = Trainer(**tiny_parts()), Averaged(**tiny_parts())
    kwargs: Any = {"num_epochs": 2, "train_dataloader_kwargs": {"shuffle": False}}
    for trainer in (plain, averaged):
        trainer.train(tiny_data(), **kwargs)
    assert torch.equal(plain.model.state_dict()["weight"], averaged.model.state_dict()["weight"])


@pytest.mark.parametrize("updates", [True, False])
def test_batch_norm_is_taken_anew_as_torch_does_it(updates: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": optimizer}
    trainer = Averaged(**parts, swa_start=1, swa_updates_batch_norm=updates)
    data = TensorDataset(*tiny_data().tensors)
    trainer.train(data, num_epochs=3, train_dataloader_kwargs={"shuffle": False})
    expected = copy.deepcopy(model)
    update_bn(DataLoader(data, batch_size=8), expected)
    norms = [module for net in (model, expected) for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    assert norms[0].running_mean is not None
    assert norms[1].running_mean is not None
    assert torch.allclose(norms[0].running_mean, norms[1].running_mean, rtol=1e-10) is updates
