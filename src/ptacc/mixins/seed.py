"""Seeds and determinism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError
from ptacc.rng import derive_seed, preserved_streams, seed_everything


class SeedMixin(Mixin):
    """Makes a run reproducible: the order of its data, randomness in loading it, and what steps draw.

    Options:
        seed: Seeds a run, from 0 to 2**32 - 1. None leaves the global generators alone, and draws a seed for the
            data, which `trainer.run.seed` tells.
        deterministic: Refuse kernels whose result varies from call to call, as torch does: some need
            `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment.

    The model is made before the trainer, so its initial weights need `torch.manual_seed` before that. While a run is
    seeded, each process draws from a stream of its own; afterwards the global generators are where they were.

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
        """Refuse what cannot seed."""
        seed: object = self.seed
        is_whole = isinstance(seed, int) and not isinstance(seed, bool)  # a float in a range is searched for one by one
        if seed is not None and not (is_whole and seed in range(2**32)):
            raise OptionError(f"{type(self).__name__}(seed={self.seed!r}): must be a whole number from 0 to 2**32 - 1.")

    @override
    def make_seed(self) -> int:
        """Return the seed that was given."""
        return super().make_seed() if self.seed is None else self.seed

    @override
    def resume_invariants(self) -> dict[str, str]:
        """Have a run go on with the seed it began with."""
        return super().resume_invariants() | {"seed": str(self.seed)}

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Seed the global generators, and put them back."""
        with contextlib.ExitStack() as stack:
            if self.seed is not None:
                stack.enter_context(preserved_streams(devices=True))
                seed_everything(derive_seed(self.seed, self.distributed.replica))
            if self.deterministic:
                stack.enter_context(deterministic_kernels())
            stack.enter_context(super().around_run())
            yield


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Have torch use deterministic kernels only, and put its flags back."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
