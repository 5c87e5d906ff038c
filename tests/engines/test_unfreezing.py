"""Parameters that join during a run: in groups that a callback adds, and in sharded models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EMAMixin,
    EpochRecord,
    FreezeMixin,
    FSDPMixin,
    GradClipMixin,
    SeedMixin,
    Steps,
    SyncBatchNormMixin,
    Trainer,
)
from ptacc.core.hooks import TrainerCore
from ptacc.errors import CheckpointError
from tests.mixins.test_freeze import BATCH, EPOCHS, SCHEDULE, every_way, make_parts, train
from tests.ranks import run_ranks


class AddsGroups(Callback[TrainerCore]):
    """Gives the optimizer a block when it is unfrozen."""

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self.add(trainer)

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self.add(trainer)  # before the run is saved

    def add(self, trainer: TrainerCore) -> None:
        for groups, name in ((1, "second"), (2, "first")):
            if trainer.progress.epochs >= groups == len(trainer.optimizer.param_groups):
                block = trainer.unwrapped_model.get_submodule(name).requires_grad_()
                trainer.optimizer.add_param_group({"params": list(block.parameters()), "lr": 0.02})


class Late(AddsGroups):
    @override
    def on_run_start(self, trainer: TrainerCore) -> None: ...


class WithGroups(CheckpointMixin, SeedMixin, GradClipMixin, EMAMixin, SyncBatchNormMixin, Trainer):
    seed: int | None = 0
    max_grad_norm: float | None = 0.5
    ema_decay: float = 0.7


def train_groups(directory: Path, callback: type[AddsGroups] = AddsGroups, **options: Any) -> dict[str, Tensor]:
    model, _, data = make_parts()
    model.requires_grad_(False).head.requires_grad_()
    given: dict[str, Any] = {"callbacks": [callback()], "checkpoint_dir": directory, "default_callbacks": (), **options}
    optimizer = AdamW(model.head.parameters(), lr=0.01)
    trainer = WithGroups(model, optimizer=optimizer, loss_func=nn.CrossEntropyLoss(), **given)
    size = BATCH // trainer.distributed.world_size
    in_order: dict[str, Any] = {"train_dataloader_kwargs": {"shuffle": False}, "per_device_batch_size": size}
    trainer.train(data, num_epochs=EPOCHS, **in_order)
    return model.state_dict() | dict(trainer.run.averages()["ema"].tensors)


def resume_with_groups(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    expected, different = train_groups(directory / "whole", checkpoint_every=Steps(1)), list[str]()
    for path in sorted((directory / "whole").glob("step-*")):
        resumed = train_groups(directory / f"after-{path.name}", resume=path)
        different += [f"{path.name}: {n}" for n, value in expected.items() if not torch.equal(resumed[n], value)]
    return expected, different


def test_added_groups_equal_one_process_and_resume_from_every_step(tmp_path: Path) -> None:
    expected = train_groups(tmp_path / "one")
    for state, different in run_ranks(resume_with_groups, 2, tmp_path):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
        assert different == []


def test_a_group_that_the_resumed_run_lacks_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    train_groups(tmp_path, Late)
    with pytest.raises(CheckpointError, match="has to add it in on_run_start, too"):
        train_groups(tmp_path, Late, resume=True)


@every_way
def test_a_sharded_model_is_unfrozen_as_on_one_process(way: str) -> None:
    expected = train(way, norm=nn.LayerNorm)

    def shard() -> dict[str, Tensor]:
        return train(way, ranks=2, norm=nn.LayerNorm, fsdp_wrap=["first", "second"], sync_batch_norm=False)

    for result in run_ranks(shard, 2):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def train_in_bfloat16() -> list[bool]:
    class Sharded(FSDPMixin, FreezeMixin, Trainer): ...

    model, _, data = make_parts(nn.LayerNorm)
    before = [parameter.detach().clone() for parameter in model.float().parameters()]
    options: dict[str, Any] = {"fsdp_wrap": ["first", "second"], "fsdp_param_dtype": torch.bfloat16}
    parts: dict[str, Any] = {"loss_func": nn.CrossEntropyLoss(), "optimizer": AdamW(model.parameters(), lr=0.01)}
    Sharded(model, **parts, **options, unfreeze_at=SCHEDULE, default_callbacks=()).train(
        TensorDataset(data.tensors[0].float(), data.tensors[1]), num_epochs=3
    )
    return [torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True)]


def test_a_unit_that_is_frozen_at_first_may_compute_in_another_dtype() -> None:
    assert run_ranks(train_in_bfloat16, 2) == [[False] * 8] * 2
