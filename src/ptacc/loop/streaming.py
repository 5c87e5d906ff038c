"""Streaming predictions: the caller's code runs between the batches, with random generators and gradients as it had."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch

from ptacc.rng import RandomStreams
from ptacc.types.aliases import T


def stream_apart(batches: Generator[T, None, None], device: torch.device) -> Iterator[T]:
    """Iterate over batches that are computed with a grad mode and random generators of their own.

    Those of the caller are restored before each batch is yielded, and when the iteration ends or is given up.

    Args:
        batches: Computes the batches, within context managers that stay open between two of them.
        device: The device whose random generator is restored, with those of the host.
    """
    streams = RandomStreams(device)
    own: tuple[dict[str, Any], bool] | None = None

    def capture() -> tuple[dict[str, Any], bool]:
        return streams.state_dict(), torch.is_grad_enabled()

    def restore(state: tuple[dict[str, Any], bool]) -> None:
        streams.load_state_dict(state[0])
        torch.set_grad_enabled(state[1])

    @contextlib.contextmanager
    def computing() -> Generator[None]:
        nonlocal own
        callers = capture()
        if own is not None:
            restore(own)
        try:
            yield
        finally:
            own = capture()
            restore(callers)

    try:
        while True:
            with computing():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
    finally:
        with computing():
            batches.close()
