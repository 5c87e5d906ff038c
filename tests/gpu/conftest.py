"""Fixtures of the tests that need a GPU; they are skipped without one. `pytest tests/gpu` runs these tests only."""

import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    # cuBLAS reads it at its first call; without it, torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
