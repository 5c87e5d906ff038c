"""A GPT-2 of transformers, on real text: the same run under each engine, to go on with, to export, and to write."""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples import gpt
from ptacc.testing import epoch_order
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

pytestmark = DEEPSPEED
GLOBAL_BATCH = 16
STEPS = 20


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    evaluation: float | None


def train(engine: str, runs: Path, *options: str) -> Outcome:
    os.environ["HF_HUB_OFFLINE"] = "1"
    size = GLOBAL_BATCH // 2 // int(os.environ.get("WORLD_SIZE", "1"))
    asked = gpt.parse(["--engine", engine, "--runs", str(runs), "--steps", str(STEPS), "--accumulate", "2", *options])
    asked.per_device_batch_size = size
    trainer = gpt.train(asked)
    trainer.export_model(runs / f"{engine}.safetensors", overwrite=True)
    steps, last = trainer.history.steps, trainer.history[-1]
    return Outcome([step.loss for step in steps], [step.logged["grad_norm"] for step in steps], last.eval_loss)


def weights_in(runs: Path, engine: str) -> dict[str, Tensor]:
    return load_file(runs / f"{engine}.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Return what comes of one process."""
    runs = tmp_path_factory.mktemp("alone")
    (outcome,) = run_ranks(train, 1, "torch", runs)
    return outcome, runs


@pytest.mark.parametrize("engine", sorted(gpt.ENGINES))
def test_every_engine_trains_as_one_process_and_leaves_what_writes(
    engine: str, tmp_path: Path, alone: tuple[Outcome, Path]
) -> None:
    expected, runs = alone
    for outcome in run_ranks(train, 2, engine, tmp_path):
        assert outcome.losses == pytest.approx(expected.losses, rel=0, abs=1e-5)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-4)
        assert outcome.evaluation == pytest.approx(expected.evaluation, rel=1e-4)
    torch.testing.assert_close(weights_in(tmp_path, engine), weights_in(runs, "torch"), rtol=1e-3, atol=1e-4)
    written = gpt.generate(tmp_path / f"{engine}.safetensors", "The ")
    assert written == gpt.generate(runs / "torch.safetensors", "The ")
    assert len(written) > len("The ")


def test_the_batches_of_a_step_differ_in_their_tokens() -> None:
    samples, _ = gpt.load_text()
    order = epoch_order(0, 0, len(samples))[: STEPS * GLOBAL_BATCH]
    lengths = torch.tensor([len(samples[number]) for number in order])
    tokens = lengths.view(STEPS, 4, -1).sum(-1)  # of two batches on each of two processes
    assert bool((tokens.amax(1) > tokens.amin(1)).all())


@pytest.mark.parametrize("engine", sorted(gpt.ENGINES))
def test_every_engine_goes_on_to_the_last_bit(engine: str, tmp_path: Path) -> None:
    whole, _ = run_ranks(train, 2, engine, tmp_path / "whole")
    run_ranks(train, 2, engine, tmp_path / "run", "--stop-at", "7")
    again, _ = run_ranks(train, 2, engine, tmp_path / "run")
    assert again == whole
    mine, theirs = (weights_in(tmp_path / name, engine) for name in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def engines_without_deepspeed() -> list[str]:
    for name in [name for name in sys.modules if name.partition(".")[0] in {"deepspeed", "examples", "ptacc"}]:
        del sys.modules[name]
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # what Python takes for a module that is not there
    return sorted(importlib.import_module("examples.gpt").ENGINES)


def test_the_script_needs_deepspeed_for_its_engine_alone() -> None:
    assert run_ranks(engines_without_deepspeed, 1) == [sorted(gpt.ENGINES)]
