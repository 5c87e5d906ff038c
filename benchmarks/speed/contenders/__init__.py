"""The contenders, one module each. `RUNS` in a module maps kinds of runs to functions: `Workload.run` names the kind.

A module imports its library at the top, and only the process of the contender imports the module. If the library is not
installed, the results omit the contender.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from benchmarks.speed.jobs import Run


class Contender(Protocol):
    """The interface of a module in this package."""

    RUNS: Mapping[str, Run]
    """A function for each supported kind of run, by name."""


@dataclass(frozen=True)
class Entry:
    """The location of a contender.

    Args:
        title: The title in the tables.
        module: The module in this package.
        packages: The packages whose import is timed, after torch.
        distribution: The name for pip.
        is_distributed: Whether the contender has a run of two processes.
    """

    title: str
    module: str
    packages: tuple[str, ...]
    distribution: str
    is_distributed: bool = False

    def load(self) -> Contender:
        """Import the contender's module.

        Raises:
            ImportError: Its library is not installed.
        """
        return cast(Contender, import_module(f"{__name__}.{self.module}"))


PLAIN = "plain"
CONTENDERS = {
    PLAIN: Entry("plain PyTorch", "plain", (), "torch", is_distributed=True),
    "ptacc": Entry("ptacc", "with_ptacc", ("accelerate", "ptacc"), "ptacc", is_distributed=True),
    "accelerate": Entry("plain Accelerate", "with_accelerate", ("accelerate",), "accelerate", is_distributed=True),
    "pytorch-accelerated": Entry(
        "pytorch-accelerated",
        "with_pytorch_accelerated",
        ("accelerate", "pytorch_accelerated"),
        "pytorch-accelerated",
    ),
    "lightning": Entry("Lightning", "with_lightning", ("lightning",), "lightning"),
    "fabric": Entry("Fabric", "with_fabric", ("lightning.fabric",), "lightning"),
    "transformers": Entry(
        "transformers Trainer", "with_transformers", ("accelerate", "transformers.trainer"), "transformers"
    ),
    "ignite": Entry("ignite", "with_ignite", ("ignite.engine",), "pytorch-ignite"),
    "skorch": Entry("skorch", "with_skorch", ("skorch",), "skorch"),
    "torchtnt": Entry("torchtnt", "with_torchtnt", ("torchtnt.framework",), "torchtnt"),
    "fastai": Entry("fastai", "with_fastai", ("fastai.learner",), "fastai"),
}
