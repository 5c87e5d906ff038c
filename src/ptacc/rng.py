"""Seeds derived from (run seed, epoch, index), and saving, restoring and seeding of the global generators."""

from __future__ import annotations

import contextlib
import hashlib
import random
import secrets
import struct
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from typing import Any, Final

import numpy as np
import torch
from numpy.random import mtrand  # `numpy.random.set_bit_generator`, which NumPy's stubs leave out
from typing_extensions import override


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


class DeviceStream:
    """The state of the global generator of one accelerator; empty for the CPU.

    Args:
        device: The device. No other one is used, or initialised.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = None if device is None or device.type == "cpu" else device

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator by the type of the device. Reading it synchronizes the device."""
        if self._device is None:
            return {}
        return {self._device.type: torch.get_device_module(self._device).get_rng_state(self._device)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, which may be that of another device of the same type."""
        if self._device is not None and self._device.type in state_dict:
            torch.get_device_module(self._device).set_rng_state(state_dict[self._device.type], self._device)


class RandomStreams:
    """The state of this process's global generators: Python's, NumPy's and torch's.

    Args:
        device: The accelerator whose generator is included, if any. Reading its state synchronizes the device.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = DeviceStream(device)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "device": self._device.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generators; that of the accelerator only if its state was saved."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        self._device.load_state_dict(state_dict["device"])


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


class HostStream(ABC):
    """A global generator on the host."""

    @abstractmethod
    def seed(self, seed: int) -> None:
        """Seed the generator."""

    @abstractmethod
    def draw(self) -> float:
        """Draw a number."""

    @abstractmethod
    def begin(self) -> Any:
        """Return what `end` needs to restore the generator. It may be another one until then."""

    @abstractmethod
    def end(self, saved: Any) -> None:
        """Restore the generator."""


class PythonStream(HostStream):
    """Python's global generator."""

    @override
    def seed(self, seed: int) -> None:
        random.seed(seed)

    @override
    def draw(self) -> float:
        return random.random()

    @override
    def begin(self) -> Any:
        return random.getstate()

    @override
    def end(self, saved: Any) -> None:
        random.setstate(saved)


class NumpyStream(HostStream):
    """NumPy's global generator. Blocks use another one: swapping generators takes half the time of restoring one."""

    _SPARE: Final = np.random.MT19937(0)

    @override
    def seed(self, seed: int) -> None:
        np.random.seed(seed % 2**32)

    @override
    def draw(self) -> float:
        return np.random.random_sample()

    @override
    def begin(self) -> Any:
        state, generator = np.random.get_state(legacy=False), mtrand.get_bit_generator()
        mtrand.set_bit_generator(self._SPARE)
        return state, generator

    @override
    def end(self, saved: Any) -> None:
        state, generator = saved
        mtrand.set_bit_generator(generator)
        # NumPy draws normal numbers in pairs. Swapping generators discards the second one of a pair.
        if state["has_gauss"] or generator is self._SPARE:
            np.random.set_state(state)


class TorchStream(HostStream):
    """Torch's global generator on the host."""

    @override
    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    @override
    def draw(self) -> float:
        return torch.rand((), dtype=torch.float64, device="cpu", generator=torch.default_generator).item()

    @override
    def begin(self) -> Any:
        return torch.default_generator.get_state()

    @override
    def end(self, saved: Any) -> None:
        torch.default_generator.set_state(saved)


HOST_STREAMS: Final[dict[str, HostStream]] = {"python": PythonStream(), "numpy": NumpyStream(), "torch": TorchStream()}
ALL_HOST_STREAMS: Final = frozenset(HOST_STREAMS)


@contextlib.contextmanager
def streams_seeded(seed: int, names: Iterable[str] = ALL_HOST_STREAMS) -> Generator[None]:
    """Seed global generators of the host for the block, and restore them after it. Blocks may be nested.

    Args:
        seed: The seed.
        names: The generators, all by default.
    """
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
