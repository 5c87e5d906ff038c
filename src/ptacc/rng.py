"""Seeds derived from (run seed, epoch, index), and saving, restoring and seeding of the global generators."""

from __future__ import annotations

import contextlib
import hashlib
import random
import secrets
import struct
from collections.abc import Iterator
from typing import Any

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
        devices: Whether to include the generators of accelerators. Reading their state synchronizes the devices.
    """

    def __init__(self, *, devices: bool = False) -> None:
        self._has_devices = devices and torch.cuda.is_available()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "devices": torch.cuda.get_rng_state_all() if self._has_devices else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generators; those of accelerators only if their states were saved."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if state_dict["devices"]:
            torch.cuda.set_rng_state_all(state_dict["devices"])


class DeviceStream:
    """The state of one CUDA device's global generator; empty for other devices.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the generator."""
        return {"device": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, which may be that of another device's generator."""
        if "device" in state_dict:
            torch.cuda.set_rng_state(state_dict["device"], self._device)


@contextlib.contextmanager
def preserved_streams(*, devices: bool = False) -> Iterator[None]:
    """Restore the global generators after the block, whatever it draws.

    Args:
        devices: Whether to restore the generators of accelerators, too. Reading their state synchronizes the devices.
    """
    streams = RandomStreams(devices=devices)
    before = streams.state_dict()
    try:
        yield
    finally:
        streams.load_state_dict(before)


_SPARE_GENERATOR = np.random.MT19937(0)
"""NumPy's global generator within `streams_seeded`: swapping generators takes half the time of restoring a state."""


@contextlib.contextmanager
def streams_seeded(seed: int) -> Iterator[None]:
    """Seed the host's global generators for the block, and restore them after it. Blocks may be nested."""
    python, cpu = random.getstate(), torch.default_generator.get_state()
    numpy, generator = np.random.get_state(legacy=False), mtrand.get_bit_generator()
    mtrand.set_bit_generator(_SPARE_GENERATOR)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(cpu)
        mtrand.set_bit_generator(generator)
        # NumPy draws normal numbers in pairs. Swapping generators discards the second one of a pair.
        if numpy["has_gauss"] or generator is _SPARE_GENERATOR:
            np.random.set_state(numpy)
