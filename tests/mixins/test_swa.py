import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate
from typing_extensions import override

from ptacc import EpochRecord, RestoreBestWeights, SWAMixin, SyncBatchNormMixin, Trainer
from ptacc.errors import OptionError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Averaged(SWAMixin, Trainer): ...


def test_the_run_ends_with_the_mean_of_its_last_epochs() -> None:
    recorded: list[Tensor] = []

    class Watched(Averaged):
        @override
        def on_epoch_end(self, record: EpochRecord) -> None:
            super().on_epoch_end(record)
            recorded.append(self.unwrapped_model.state_dict()["weight"].clone())

    trainer = Watched(**tiny_parts(), swa_start=2)
    trainer.train(tiny_data(), num_epochs=4)
    torch.testing.assert_close(trainer.model.state_dict()["weight"], sum(recorded[1:], torch.zeros(())) / 3)


def test_without_a_start_nothing_is_averaged() -> None:
    plain, averaged = Trainer(**tiny_parts()), Averaged(**tiny_parts())
    kwargs: Any = {"num_epochs": 2, "train_dataloader_kwargs": {"shuffle": False}}
    for trainer in (plain, averaged):
        trainer.train(tiny_data(), **kwargs)
    assert torch.equal(plain.model.state_dict()["weight"], averaged.model.state_dict()["weight"])


def test_a_run_that_ends_before_the_start_says_so() -> None:
    trainer = Averaged(**tiny_parts(), swa_start=3)
    with pytest.warns(UserWarning, match="no weights were averaged, since the run completed 2"):
        trainer.train(tiny_data(), num_epochs=2)


@pytest.mark.parametrize("updates", [True, False])
def test_batch_norm_statistics_are_recomputed_as_torch_does(updates: bool) -> None:
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


def test_a_norm_in_eval_mode_keeps_its_statistics() -> None:
    class Frozen(Averaged):
        @override
        def on_run_start(self) -> None:
            super().on_run_start()
            self.unwrapped_model.get_submodule("0").eval()

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    before = copy.deepcopy(model.state_dict())
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    Frozen(**parts, swa_start=1).train(tiny_data(), num_epochs=1)
    assert torch.equal(model.state_dict()["0.running_var"], before["0.running_var"])
    assert not torch.equal(model.state_dict()["2.running_var"], before["2.running_var"])


# ---- on two processes, of which one has fewer batches


class WatchedOnTwo(Averaged):
    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        weights.append(torch.cat([p.detach().flatten() for p in self.unwrapped_model.parameters()]))


class SyncedOnTwo(SyncBatchNormMixin, WatchedOnTwo): ...


weights: list[Tensor] = []


# The batches of each rank. Of a last global batch of 1 sample, and of a dataset of 1, the first rank has none.
DEALT = {
    "ragged": [range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 20), range(20, 24), range(24, 25)],
    "one": [range(1)],
    "sharded": [range(4), range(4, 8), range(8, 12), range(12, 16), range(16, 20), range(20, 22)],
}


# The global batches.
TOGETHER: dict[str, list[Sequence[int]]] = {
    "ragged": [range(8), range(8, 16), range(16, 24), range(24, 25)],
    "one": [range(1)],
    "sharded": [(*range(4), *range(16, 20)), (*range(4, 8), *range(20, 22)), range(8, 12), range(12, 16)],
}


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3)]
    layers[1].add_module("never_called", nn.BatchNorm2d(3, affine=False))
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)).double()


def train_on_two(kind: type[WatchedOnTwo], dealt: str, collate_fn: Any = None) -> tuple[dict[str, Tensor], Tensor]:
    """Train, and return the state of the model with the mean of its weights at the end of each epoch."""
    weights.clear()
    model = make_net()
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer = kind(**parts, swa_start=1)
    data: TensorDataset | Subset[Any] = tiny_data(DEALT[dealt][-1].stop)
    if dealt == "sharded":
        data = Subset(data, range(16) if trainer.distributed.rank == 0 else range(16, 22))
    options: Any = {"per_device_batch_size": 4, "train_dataloader_kwargs": {"shuffle": False}, "collate_fn": collate_fn}
    trainer.train(data, num_epochs=2, data_is_sharded=dealt == "sharded", **options)
    return dict(model.state_dict()), torch.stack(weights).mean(dim=0)


@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize("kind", [WatchedOnTwo, SyncedOnTwo])
def test_two_processes_end_with_one_average_and_the_mean_of_all_their_batches(
    kind: type[WatchedOnTwo], dealt: str
) -> None:
    (state, mean), (others_state, _) = run_ranks(train_on_two, 2, kind, dealt, None, timeout=30)
    assert [name for name in state if not torch.equal(state[name], others_state[name])] == []
    model = make_net()
    model.load_state_dict(state)
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.testing.assert_close(own, mean, rtol=1e-12, atol=0)

    check_statistics(state, TOGETHER[dealt] if kind is SyncedOnTwo else DEALT[dealt], DEALT[dealt][-1].stop)


def check_statistics(state: dict[str, Tensor], batches: Sequence[Sequence[int]], samples: int = 25) -> None:
    """Check that the statistics of the norm are means over batches."""
    model = make_net()
    model.load_state_dict(state)
    inputs = tiny_data(samples).tensors[0]
    hidden = [model[:2](inputs[list(batch)]).detach().transpose(0, 1).flatten(1) for batch in batches]
    expected = {"running_mean": [h.mean(dim=1) for h in hidden], "running_var": [h.var(dim=1) for h in hidden]}
    for name, values in expected.items():
        torch.testing.assert_close(state[f"2.{name}"], torch.stack(values).mean(dim=0), rtol=1e-12, atol=0)
    assert int(state["2.num_batches_tracked"]) == len(hidden)


def leave_third_out(samples: list[Any]) -> Any:
    batch = default_collate(samples)
    return None if torch.equal(batch[0][0], tiny_data(25).tensors[0][8]) else batch


@pytest.mark.parametrize("kind", [WatchedOnTwo, SyncedOnTwo])
def test_batches_that_a_collate_function_leaves_out_are_not_in_the_statistics(kind: type[WatchedOnTwo]) -> None:
    check_statistics(train_on_two(kind, "ragged", leave_third_out)[0], DEALT["ragged"][:2] + DEALT["ragged"][3:])
    together = [range(8), range(12, 16), range(16, 24), range(24, 25)]
    batches = together if kind is SyncedOnTwo else DEALT["ragged"][:2] + DEALT["ragged"][3:]
    for state, _ in run_ranks(train_on_two, 2, kind, "ragged", leave_third_out, timeout=30):
        check_statistics(state, batches)


def test_a_run_cannot_end_with_the_best_weights_and_with_the_average() -> None:
    trainer = Averaged(**tiny_parts(), swa_start=1, callbacks=[RestoreBestWeights("train_loss")])
    with pytest.raises(OptionError, match="cannot end both"):
        trainer.train(tiny_data(), num_epochs=1)
    watched = RestoreBestWeights("train_loss", restore=False)
    Averaged(**tiny_parts(), swa_start=1, callbacks=[watched]).train(tiny_data(), num_epochs=1)
    assert watched.best_epoch == 1


def synced_to_the_end(per_device_batch_size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    parts: dict[str, Any] = {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    options: Any = {"per_device_batch_size": per_device_batch_size, "train_dataloader_kwargs": {"shuffle": False}}
    SyncedOnTwo(**parts, swa_start=1).train(tiny_data(10), num_epochs=2, **options)
    return dict(model.state_dict())


def test_the_last_pass_uses_the_global_batch_with_synchronised_batch_norm() -> None:
    alone = synced_to_the_end(8)  # each rank has 1 sample of the last global batch of 2
    for split in run_ranks(synced_to_the_end, 2, 4, timeout=30):
        for name, value in alone.items():
            torch.testing.assert_close(split[name], value, rtol=1e-12, atol=1e-15)
