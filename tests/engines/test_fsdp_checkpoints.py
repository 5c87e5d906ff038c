"""Checkpoints of a sharded run: each rank writes its shards; exact resume; full tensors for other readers."""

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import override

from ptacc import CheckpointMixin, FSDPMixin, RestoreBestWeights, StepResult, Steps
from ptacc.cli import main
from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.storage.remote_store import open_store
from tests.engines.nets import Averaging, digits, make, make_optimizer
from tests.ranks import run_ranks


class Plain(CheckpointMixin, Averaging): ...


class Sharded(FSDPMixin, Plain): ...


LAST, INTERRUPTED_AFTER = 9, 5
"""Steps of a complete run, and of one that ends within its first epoch."""


def make_trainer(
    kind: type[Plain], directory: Path, optimizer: str = "adamw", *, has_batch_norm: bool = True, **options: Any
) -> Plain:
    model = make(has_batch_norm=has_batch_norm)
    return kind(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model, optimizer),
        default_callbacks=(),
        checkpoint_dir=directory,
        checkpoint_every=Steps(2),
        **options,
    )


Outcome: TypeAlias = tuple[list[float], dict[str, Tensor]]
"""The losses of all steps; the weights, and the optimizer's state."""


def train(kind: type[Plain], directory: Path, steps: int = LAST, **options: Any) -> Outcome:
    """Train, or resume, up to a number of steps."""
    trainer = make_trainer(kind, directory, **options)
    size = 12 // trainer.distributed.world_size
    history = trainer.train(digits(200), digits(70), num_epochs=2, max_steps=steps, per_device_batch_size=size)
    state = trainer.optimizer.state_dict()["state"]
    tensors = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}
    return [step.loss for step in history.steps], tensors


def equal(these: dict[str, Tensor], those: dict[str, Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.prove)])
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.prove)])
@pytest.mark.parametrize(
    "interrupted_after", [INTERRUPTED_AFTER, *(pytest.param(n, marks=pytest.mark.prove) for n in (1, 2, 8))]
)
def test_a_run_resumes_to_the_last_bit(
    tmp_path: Path, optimizer: str, background: bool, interrupted_after: int
) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "checkpoint_in_background": background}
    whole = run_ranks(lambda: train(Sharded, tmp_path / "whole", **options), 2)
    run_ranks(lambda: train(Sharded, tmp_path / "run", interrupted_after, **options), 2)
    again = run_ranks(lambda: train(Sharded, tmp_path / "run", resume=True, **options), 2)
    for (losses, tensors), (expected, theirs) in zip(again, whole, strict=True):
        assert losses == expected
        assert equal(tensors, theirs)


def test_a_run_with_replicas_of_the_shards_resumes_to_the_last_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fsdp_replicas": 2}
    whole = run_ranks(lambda: train(Sharded, tmp_path / "whole", **options), 4)
    run_ranks(lambda: train(Sharded, tmp_path / "run", INTERRUPTED_AFTER, **options), 4)
    again = run_ranks(lambda: train(Sharded, tmp_path / "run", resume=True, **options), 4)
    for (losses, tensors), (expected, theirs) in zip(again, whole, strict=True):
        assert losses == expected
        assert equal(tensors, theirs)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    weights = {name: tensor for name, tensor in whole[0][1].items() if not name[0].isdigit()}
    assert equal(load_file(tmp_path / "out.safetensors"), weights)


def test_each_rank_writes_only_its_own_shards(tmp_path: Path) -> None:
    run_ranks(lambda: train(Sharded, tmp_path, INTERRUPTED_AFTER), 2)
    run_ranks(lambda: train(Plain, tmp_path / "replicas", INTERRUPTED_AFTER), 2)
    manifest, replicas = (
        open_store(tmp_path).manifests()[-1],
        open_store(tmp_path / "replicas").manifests()[-1],
    )
    size = {name: file.size for name, file in manifest.files.items() if name.endswith("safetensors")}
    together = sum(file.size for name, file in replicas.files.items() if name.endswith("safetensors"))
    assert "shared.safetensors" not in size or size["shared.safetensors"] < 0.02 * together
    assert sum(size.values()) < 1.1 * together
    assert max(size.values()) < 0.6 * together


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    def go(directory: str, steps: int = LAST, **options: Any) -> Outcome:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The run resumes with")
            return train(Sharded, tmp_path / directory, steps, has_batch_norm=False, **options)

    (losses, tensors), *_ = run_ranks(lambda: go("whole"), before)
    run_ranks(lambda: go("run", INTERRUPTED_AFTER), before)
    (again, mine), *_ = run_ranks(lambda: go("run", resume=True), after)
    assert again == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(mine, tensors, rtol=1e-3, atol=1e-4)


def evaluate(kind: type[Plain], path: Path, start_from: Path) -> float:
    trainer = make_trainer(kind, path, ema_evaluates=False)
    trainer.load_checkpoint(start_from, weights_only=True)
    return trainer.evaluate(digits(70), per_device_batch_size=10).loss


def test_readers_get_full_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, tensors), _ = run_ranks(lambda: train(Sharded, tmp_path / "run"), 2)
    weights = {name: tensor for name, tensor in tensors.items() if not name[0].isdigit()}
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "ema.safetensors"), "--averages", "ema"]) == 0
    capsys.readouterr()
    assert equal(load_file(tmp_path / "out.safetensors"), weights)
    model = make(has_batch_norm=True)
    model.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    alone = evaluate(Plain, tmp_path / "alone", tmp_path / "run")
    assert run_ranks(evaluate, 2, Sharded, tmp_path / "sharded", tmp_path / "run") == pytest.approx([alone, alone])
    assert run_ranks(evaluate, 2, Plain, tmp_path / "replicas", tmp_path / "run") == pytest.approx([alone, alone])


def exports_within_a_run(directory: Path) -> None:
    class Exporting(Sharded):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            if step.step == 3:
                self.export_model(directory / "within.safetensors")
                self.export_model(directory / "averages.safetensors", averages="ema")

    train(Exporting, directory / "run", 4)


def test_a_sharded_model_is_exported_in_full(tmp_path: Path) -> None:
    run_ranks(exports_within_a_run, 2, tmp_path)
    (_, tensors), _ = run_ranks(lambda: train(Sharded, tmp_path / "three", 3), 2)
    exported = load_file(tmp_path / "within.safetensors")
    assert equal(exported, {name: tensor for name, tensor in tensors.items() if name in exported})
    assert exported.keys() == make(has_batch_norm=True).state_dict().keys()
    assert load_file(tmp_path / "averages.safetensors").keys() == exported.keys()


def test_the_best_weights_of_a_callback_are_resumed(tmp_path: Path) -> None:
    def best(directory: Path, steps: int, **options: Any) -> dict[str, Tensor]:
        _, tensors = train(Sharded, directory, steps, callbacks=[RestoreBestWeights("eval_loss")], **options)
        return tensors

    whole, _ = run_ranks(best, 2, tmp_path / "whole", 18)
    run_ranks(best, 2, tmp_path / "run", 10)
    again, _ = run_ranks(lambda: best(tmp_path / "run", 18, resume=True), 2)
    assert equal(again, whole)


def test_a_trainer_with_another_engine_raises(tmp_path: Path) -> None:
    run_ranks(lambda: train(Sharded, tmp_path, INTERRUPTED_AFTER), 2)

    def error_message() -> str:
        with pytest.raises(CheckpointError) as refused:
            train(Plain, tmp_path, resume=True)
        return str(refused.value)

    for said in run_ranks(error_message, 2):
        assert "engine was 'fsdp' and is 'torch'" in said


def test_a_missing_shard_is_damage(tmp_path: Path) -> None:
    run_ranks(lambda: train(Sharded, tmp_path, 2), 2)
    (name,) = open_store(tmp_path).names()
    (tmp_path / name / "rank-1.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"rank-1\.safetensors"):
        make_trainer(Plain, tmp_path / "other").load_checkpoint(tmp_path / name)
