"""Parts of timm in a trainer: optimizers, loaders, Mixup and averaged weights."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    EMAMixin,
    Pair,
    SeedMixin,
    StateKey,
    StepOutput,
    StepResult,
    Steps,
    SyncBatchNormMixin,
    Trainer,
    TrainerCore,
)
from ptacc.errors import DataError
from ptacc.loop.hints import find_hint
from tests.ranks import run_ranks
from tests.vision.environment import enable_vision

DATA = TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(2, (32,)))


class ImageTrainer(SeedMixin, CheckpointMixin, Trainer):
    """Mixes batches, if there is something that does."""

    mixup: Callable[[Tensor, Tensor], Pair] | None = None

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return super().train_step(batch if self.mixup is None else self.mixup(*batch))


class StopAt(Callback[TrainerCore]):
    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == self.step:
            trainer.stop("this is the step")


def make_trainer(directory: Path, optimizer: str = "sgd", **options: Any) -> ImageTrainer:
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    return ImageTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=create_optimizer_v2(model, opt=optimizer, lr=1e-2, weight_decay=0.05),
        seed=0,
        checkpoint_dir=directory,
        checkpoint_every=Steps(2),
        resume=True,
        resume_ignore={"stop"},
        default_callbacks=(),
        **options,
    )


def train_losses(directory: Path, **options: Any) -> list[float]:
    """Return the losses of 4 steps, or of those until a callback stops the run."""
    history = make_trainer(directory, **options).train(DATA, num_epochs=1, per_device_batch_size=8)
    return [step.loss for step in history.steps]


def differs_if_resumed(directory: Path, **options: Any) -> bool:
    """Return whether a run that was stopped after step 2, and resumed, has other losses than one that was not."""
    train_losses(directory / "resumed", callbacks=[StopAt(2)], **options)
    return train_losses(directory / "resumed", **options) != train_losses(directory / "whole", **options)


NEED_MORE = ["bnb*", "fused*", "adahessian", "kron*"]
"""Optimizers that need a GPU, a graph of the gradients, or a compiler."""


def find_optimizers_that_do_not_resume(directory: Path) -> list[str]:
    enable_vision()
    from timm.optim import list_optimizers

    names = list_optimizers(exclude_filters=NEED_MORE)
    assert len(names) > 80
    return [name for name in names if differs_if_resumed(directory / name, optimizer=name)]


@pytest.mark.timeout(120)
def test_every_optimizer_of_timm_resumes_exactly(tmp_path: Path) -> None:
    assert run_ranks(find_optimizers_that_do_not_resume, 1, tmp_path, timeout=110) == [[]]


def resume_with_mixup(directory: Path) -> bool:
    enable_vision()
    from timm.data import Mixup

    return differs_if_resumed(directory, mixup=Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, num_classes=2))


def test_a_run_with_mixup_of_timm_resumes_exactly(tmp_path: Path) -> None:
    assert run_ranks(resume_with_mixup, 1, tmp_path) == [False]


def mix_an_odd_batch() -> str:
    enable_vision()
    from timm.data import Mixup

    with pytest.raises(AssertionError) as caught:
        Mixup(num_classes=2)(*DATA[:3])
    return str(caught.value)


def test_the_error_of_mixup_for_an_odd_batch_has_a_hint() -> None:
    (message,) = run_ranks(mix_an_odd_batch, 1)
    assert '{"drop_last": True}' in (find_hint(message) or "")


# ---- averaged weights

AVERAGE: StateKey[Any] = StateKey("timm_average")


class BothAverages(EMAMixin, Trainer):
    """Averages with `EMAMixin`, and with `ModelEmaV3` of timm."""

    ema_decay: float = 0.9

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        from timm.utils import ModelEmaV3

        self.run[AVERAGE] = ModelEmaV3(self.unwrapped_model, decay=self.ema_decay)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.run[AVERAGE].update(self.unwrapped_model)


def average_twice() -> list[Mapping[str, Tensor]]:
    enable_vision()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = BothAverages(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, default_callbacks=())
    trainer.train(DATA, num_epochs=2)
    with trainer.averaged_weights():
        return [copy.deepcopy(net.state_dict()) for net in (trainer.run[AVERAGE].module, model)]


def test_ema_mixin_has_the_averages_of_timm() -> None:
    ((theirs, ours),) = run_ranks(average_twice, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- batch norm


class SyncedTrainer(SeedMixin, SyncBatchNormMixin, Trainer):
    pass


def train_efficientnet() -> list[float]:
    enable_vision()
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = SyncedTrainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, seed=0, default_callbacks=())
    data = TensorDataset(DATA.tensors[0].double(), DATA.tensors[1])
    batch_size = 16 // trainer.distributed.world_size
    return [step.loss for step in trainer.train(data, num_epochs=2, per_device_batch_size=batch_size).steps]


def test_batch_norm_of_timm_is_synchronised() -> None:
    (expected,) = run_ranks(train_efficientnet, 1)
    assert len(expected) == 4
    for losses in run_ranks(train_efficientnet, 2):
        assert losses == pytest.approx(expected, rel=1e-9)


# ---- loaders


def train_with_loader(folder: Path, directory: Path, options: Mapping[str, Any]) -> int:
    enable_vision()
    from timm.data import ImageDataset, create_loader

    for index, image in enumerate(torch.randint(256, (20, 8, 8), dtype=torch.uint8)):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    loader = create_loader(ImageDataset(str(folder)), input_size=(3, 8, 8), batch_size=4, is_training=True, **options)
    history = make_trainer(directory).train(loader, num_epochs=2)
    return history[-1].step


LOADERS = {
    "no workers": {"num_workers": 0},
    "workers": {"num_workers": 2},
    "workers that persist": {"num_workers": 2, "use_multi_epochs_loader": True},
}


@pytest.mark.parametrize("options", LOADERS.values(), ids=LOADERS)
def test_a_loader_of_timm_is_passed_as_it_is(tmp_path: Path, options: Mapping[str, Any]) -> None:
    options = {**options, "use_prefetcher": False}
    assert run_ranks(train_with_loader, 1, tmp_path / "images", tmp_path / "run", options) == [10]


def train_with_prefetcher(folder: Path, directory: Path) -> str:
    with pytest.raises(DataError) as caught:
        train_with_loader(folder, directory, {"device": torch.device("cpu"), "num_workers": 0})
    return str(caught.value)


def test_the_prefetcher_of_timm_is_refused_with_the_way_to_leave_it_out(tmp_path: Path) -> None:
    (message,) = run_ranks(train_with_prefetcher, 1, tmp_path / "images", tmp_path / "run")
    assert "PrefetchLoader wraps a DataLoader" in message
    assert "use_prefetcher=False" in message
