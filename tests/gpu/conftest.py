"""What tests on a GPU share. Without one, each of them is skipped; with one, `pytest tests/gpu` runs them alone."""

import os
from collections.abc import Iterator

import pytest
import torch

if torch.cuda.is_available():
    # cuBLAS reads it when it is first called; without it, torch refuses matrix products that are to be deterministic.
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
    """Have the same kernels give the same bits."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
