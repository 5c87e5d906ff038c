"""Settings and fixtures for all tests: one torch thread, seeded generators, hypothesis and DeepSpeed."""

import fcntl
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from ptacc.distributed.accelerator import release_accelerator

# A shell starts a background job with SIGINT ignored, and nohup with SIGHUP ignored, which the tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests fork (tests/ranks.py), and a forked process does not have the threads of its parent's pools.
torch.set_num_threads(1)

# The first training step is slower than later ones, which hypothesis reports as flaky.
hypothesis.settings.register_profile("ptacc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ptacc")

# For type checkers only: importing these files would run the mistakes in them.
collect_ignore = ["typing"]

BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture(autouse=True)
def own_accelerator() -> None:
    """Start each test without an accelerator: the traceback of a failed test keeps its trainer alive."""
    release_accelerator()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - user code draws from the global generator, so tests must fix that one
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def deepspeed_built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile and import the slow parts of DeepSpeed before ranks are forked.

    Each test run has a copy of what was compiled once: a rank that is killed while it loads an extension leaves a lock,
    for which all later ranks would wait forever.
    """
    kept, own = Path(sys.prefix) / "torch_extensions", tmp_path_factory.mktemp("built") / "torch_extensions"
    with pytest.MonkeyPatch.context() as patch:
        # A ninja of another version would compile again, in each rank.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with Path(f"{kept}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two test processes, one compiles
            if not any(kept.glob("*/*.so")):
                compiled = Path(tempfile.mkdtemp(prefix="torch_extensions-", dir=sys.prefix))
                patch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
                subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=300, capture_output=True)
                shutil.rmtree(kept, ignore_errors=True)
                compiled.rename(kept)
        shutil.copytree(kept, own, ignore=shutil.ignore_patterns("lock"))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(own))
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        yield
