"""Seeds and determinism."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError
from ptacc.rng import derive_seed, preserved_streams, seed_everything


class SeedMixin(Mixin):
    """Makes a run reproducible: the order of the data, data loading, and random operations in steps.

    The model is created before the trainer: call `torch.manual_seed` before that for reproducible initial weights.
    During a seeded run each rank has its own random stream. The states of the global generators are restored after it.

    Options:
        seed: The seed of the run, from 0 to 2**32 - 1. None leaves the global generators alone and draws a seed for the
            order of the data, `trainer.run.seed`.
        deterministic: Whether to allow deterministic kernels only (`torch.use_deterministic_algorithms`). Some need
            `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment.

    Hooks: `make_seed`, `resume_invariants`, `around_run`.

    Combines with: everything.

    Example:
        >>> from ptacc import SeedMixin, Trainer
        >>> class MyTrainer(SeedMixin, Trainer):
        ...     seed = 42
    """

    seed: int | None = None
    deterministic: bool = False

    @override
    def check_options(self) -> None:
        seed: object = self.seed
        is_valid = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32
        if seed is not None and not is_valid:
            raise OptionError(f"{type(self).__name__}(seed={self.seed!r}): must be a whole number from 0 to 2**32 - 1.")

    @override
    def make_seed(self) -> int:
        return super().make_seed() if self.seed is None else self.seed

    @override
    def resume_invariants(self) -> dict[str, str]:
        return super().resume_invariants() | {"seed": str(self.seed)}

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with contextlib.ExitStack() as stack:
            if self.seed is not None:
                stack.enter_context(preserved_streams(self.device))
                seed_everything(derive_seed(self.seed, self.distributed.replica))
            if self.deterministic:
                stack.enter_context(deterministic_kernels())
            stack.enter_context(super().around_run())
            yield


@contextlib.contextmanager
def deterministic_kernels() -> Generator[None]:
    """Allow deterministic kernels only; restore torch's settings afterwards."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
