"""Seeds derived from (run seed, epoch, index), and saving, restoring and seeding of the global generators."""

from __future__ import annotations

import contextlib
import hashlib
import random
import secrets
import struct
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.random import mtrand  # `numpy.random.set_bit_generator`, which NumPy's stubs leave out


def fresh_seed() -> int:
    """Return a seed from the operating system. No generator is used."""
    return secrets.randbits(32)


def derive_seed(*path: int) -> int:
    """Hash integers to a seed of 63 bits, the same on every machine. Neighbouring integers give unrelated streams.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(path)}q", *path), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # every generator accepts 63 bits


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomStreams:
    """The state of this process's global generators: Python's, NumPy's and torch's.

    Args:
        device: The accelerator whose generator is included, if any. No other one is used, or initialised. Reading its
            state synchronizes the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = None if device is None or device.type == "cpu" else device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators, that of the accelerator by the type of the device."""
        device, states = self._device, dict[str, Any]()
        if device is not None:
            states = {device.type: torch.get_device_module(device).get_rng_state(device)}
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "device": states,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generators; that of the accelerator if the state of one of its type was saved."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        device, states = self._device, state_dict["device"]
        if device is not None and device.type in states:
            torch.get_device_module(device).set_rng_state(states[device.type], device)


@contextlib.contextmanager
def preserved_streams(device: torch.device | None = None) -> Generator[None]:
    """Restore the global generators after the block, whatever it draws.

    Args:
        device: The accelerator whose generator is restored, too. Reading its state synchronizes the device.
    """
    streams = RandomStreams(device)
    before = streams.state_dict()
    try:
        yield
    finally:
        streams.load_state_dict(before)


class HostStream(NamedTuple):
    """The functions of a global generator on the host.

    Args:
        seed: Seeds it.
        draw: Draws a number.
        begin: Returns what `end` needs to restore it. It may be another generator until then.
        end: Restores it.
    """

    seed: Callable[[int], object]
    draw: Callable[[], float]
    begin: Callable[[], Any]
    end: Callable[[Any], object]


def _begin_numpy() -> Any:
    """Use another generator for the block: swapping generators takes half the time of restoring one."""
    state, generator = np.random.get_state(legacy=False), mtrand.get_bit_generator()
    mtrand.set_bit_generator(_SPARE)
    return state, generator


def _end_numpy(saved: Any) -> None:
    state, generator = saved
    mtrand.set_bit_generator(generator)
    # NumPy draws normal numbers in pairs. Swapping generators discards the second one of a pair.
    if state["has_gauss"] or generator is _SPARE:
        np.random.set_state(state)


def _draw_torch() -> float:
    return torch.rand((), dtype=torch.float64, device="cpu", generator=_TORCH).item()


_SPARE: Final = np.random.MT19937(0)
_TORCH: Final = torch.default_generator
HOST_STREAMS: Final[dict[str, HostStream]] = {
    "python": HostStream(random.seed, random.random, random.getstate, random.setstate),
    "numpy": HostStream(lambda seed: np.random.seed(seed % 2**32), np.random.random_sample, _begin_numpy, _end_numpy),
    "torch": HostStream(_TORCH.manual_seed, _draw_torch, _TORCH.get_state, _TORCH.set_state),
}
ALL_HOST_STREAMS: Final = frozenset(HOST_STREAMS)


@contextlib.contextmanager
def streams_seeded(seed: int, names: Iterable[str] = ALL_HOST_STREAMS) -> Generator[None]:
    """Seed global generators of the host for the block, and restore them after it. Blocks may be nested."""
    streams = [HOST_STREAMS[name] for name in names]
    saved = [stream.begin() for stream in streams]
    for stream in streams:
        stream.seed(seed)
    try:
        yield
    finally:
        for stream, state in zip(streams, saved, strict=True):
            stream.end(state)


def find_drawn_streams(seed: int) -> frozenset[str]:
    """Return which generators of the host were drawn from in a block of `streams_seeded(seed)`, at its end."""
    next_numbers = {name: stream.draw() for name, stream in HOST_STREAMS.items()}
    for stream in HOST_STREAMS.values():
        stream.seed(seed)
    return frozenset(name for name, stream in HOST_STREAMS.items() if stream.draw() != next_numbers[name])
