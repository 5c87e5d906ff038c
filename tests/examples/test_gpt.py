"""The GPT-2 example under each engine: training, resuming, exporting and generating text."""

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
class ExampleResult:
    losses: list[float]
    norms: list[float]
    evaluation: float | None


def train(engine: str, runs: Path, *options: str) -> ExampleResult:
    os.environ["HF_HUB_OFFLINE"] = "1"
    size = GLOBAL_BATCH // 2 // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = gpt.parse(
        ["--engine", engine, "--runs", str(runs), "--steps", str(STEPS), "--accumulate", "2", *options]
    )
    arguments.per_device_batch_size = size
    trainer = gpt.train(arguments)
    trainer.export_model(runs / f"{engine}.safetensors", overwrite=True)
    steps, last = trainer.history.steps, trainer.history[-1]
    return ExampleResult([step.loss for step in steps], [step.logged["grad_norm"] for step in steps], last.eval_loss)


def load_weights(runs: Path, engine: str) -> dict[str, Tensor]:
    return load_file(runs / f"{engine}.safetensors")


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExampleResult, Path]:
    """Return the result of one process and its run directory."""
    runs = tmp_path_factory.mktemp("single_process")
    (outcome,) = run_ranks(train, 1, "torch", runs)
    return outcome, runs


@pytest.mark.parametrize("engine", sorted(gpt.ENGINES))
def test_every_engine_trains_like_one_process_and_exports_usable_weights(
    engine: str, tmp_path: Path, single_process: tuple[ExampleResult, Path]
) -> None:
    expected, runs = single_process
    for outcome in run_ranks(train, 2, engine, tmp_path):
        assert outcome.losses == pytest.approx(expected.losses, rel=0, abs=1e-5)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-4)
        assert outcome.evaluation == pytest.approx(expected.evaluation, rel=1e-4)
    torch.testing.assert_close(load_weights(tmp_path, engine), load_weights(runs, "torch"), rtol=1e-3, atol=1e-4)
    generated = gpt.generate(tmp_path / f"{engine}.safetensors", "The ")
    assert generated == gpt.generate(runs / "torch.safetensors", "The ")
    assert len(generated) > len("The ")


def test_the_batches_of_a_step_differ_in_their_tokens() -> None:
    samples, _ = gpt.load_text()
    order = epoch_order(0, 0, len(samples))[: STEPS * GLOBAL_BATCH]
    lengths = torch.tensor([len(samples[number]) for number in order])
    tokens = lengths.view(STEPS, 4, -1).sum(-1)  # two batches on each of two processes
    assert bool((tokens.amax(1) > tokens.amin(1)).all())


@pytest.mark.parametrize("engine", sorted(gpt.ENGINES))
def test_every_engine_resumes_bit_identically(engine: str, tmp_path: Path) -> None:
    uninterrupted, _ = run_ranks(train, 2, engine, tmp_path / "uninterrupted")
    run_ranks(train, 2, engine, tmp_path / "run", "--stop-at", "7")
    result, _ = run_ranks(train, 2, engine, tmp_path / "run")
    assert result == uninterrupted
    resumed, expected = (load_weights(tmp_path / name, engine) for name in ("run", "uninterrupted"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def list_engines_without_deepspeed() -> list[str]:
    for name in [name for name in sys.modules if name.partition(".")[0] in {"deepspeed", "examples", "ptacc"}]:
        del sys.modules[name]
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # makes `import deepspeed` fail
    return sorted(importlib.import_module("examples.gpt").ENGINES)


def test_the_script_needs_deepspeed_for_its_engine_only() -> None:
    assert run_ranks(list_engines_without_deepspeed, 1) == [sorted(gpt.ENGINES)]
