"""What the tests of several engines need."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"


@pytest.fixture(scope="session")
def deepspeed_built() -> Iterator[None]:
    """Compile and import what takes long before the ranks are forked.

    A rank that is killed while it compiles would leave a lock behind, for which all others wait for good.
    """
    built = Path(sys.prefix) / "torch_extensions" / "deepspeed_shm_comm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(built.parent))
        if (built / "lock").exists() or not (built / "deepspeed_shm_comm.so").exists():
            shutil.rmtree(built, ignore_errors=True)
            subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=100, capture_output=True)
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        yield
