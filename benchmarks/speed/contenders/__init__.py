"""The contenders, a module each: `RUNS` says which workloads it takes on, and how.

A module imports its library at the top, and is itself imported in the contender's own process alone: where the library
is not installed, the contender is absent from the results, and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from benchmarks.speed.jobs import Run


class Contender(Protocol):
    """A module of this package."""

    RUNS: Mapping[str, Run]
    """How it does each workload that it takes on, by name."""


@dataclass(frozen=True)
class Entry:
    """Where a contender is found.

    Args:
        title: What the table calls it.
        module: Its module in this package.
        packages: What it imports, whose import is timed; torch comes before them.
        distribution: What pip calls it.
    """

    title: str
    module: str
    packages: tuple[str, ...]
    distribution: str

    def load(self) -> Contender:
        """Import the contender's module.

        Raises:
            ImportError: Its library is not installed.
        """
        return cast(Contender, import_module(f"{__name__}.{self.module}"))


PLAIN = "plain"
CONTENDERS = {
    PLAIN: Entry("plain PyTorch", "plain", (), "torch"),
    "ptacc": Entry("ptacc", "with_ptacc", ("accelerate", "ptacc"), "ptacc"),
    "accelerate": Entry("plain Accelerate", "with_accelerate", ("accelerate",), "accelerate"),
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
