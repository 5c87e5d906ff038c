"""What every test shares: one torch thread, seeded generators, and no time limit on a hypothesis example."""

import random

import hypothesis
import numpy as np
import pytest
import torch

from ptacc.core.device import release_accelerator

# Tests fork (tests/ranks.py), and a forked child has none of the threads of a pool that its parent started.
torch.set_num_threads(1)

# A training step's first run is slow and its later ones are not, which hypothesis takes for flakiness.
hypothesis.settings.register_profile("ptacc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ptacc")

# For the type checkers alone: importing them would run the very mistakes they hold.
collect_ignore = ["typing"]


@pytest.fixture(autouse=True)
def own_accelerator() -> None:
    """Start each test without an accelerator: a failed test's traceback holds on to its trainer, and so to that."""
    release_accelerator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - user code draws from the global generator, so tests must fix that one
    torch.manual_seed(0)
