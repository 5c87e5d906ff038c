"""Random streams: seeds derived from (run seed, epoch, index), and the global generators kept apart from them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import random
import secrets
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand


def fresh_seed() -> int:
    """Draw a seed from the operating system, touching no generator."""
    return secrets.randbits(32)


def derive_seed(*path: int) -> int:
    """Hash integers to a seed, the same on every machine: streams of neighbouring integers have nothing in common.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(path)}q", *path), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits: what every generator takes


def permutation(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order of `n` samples in an epoch: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RandomStreams:
    """The global generators of this process, as something whose state can be kept: Python's, NumPy's and torch's.

    Args:
        devices: Whether those of accelerators belong to it; reading their state waits for them.
    """

    def __init__(self, *, devices: bool = False) -> None:
        """Look at the generators, and leave them alone."""
        self._has_devices = devices and torch.cuda.is_available()

    def state_dict(self) -> dict[str, Any]:
        """Return where the generators are."""
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "devices": torch.cuda.get_rng_state_all() if self._has_devices else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the generators where they were. Those of devices are left alone where none were kept."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        if state_dict["devices"]:
            torch.cuda.set_rng_state_all(state_dict["devices"])


class DeviceStream:
    """The global generator of an accelerator; there is none for the host's.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        """Look at the generator, and leave it alone."""
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return where the generator is."""
        return {"device": torch.cuda.get_rng_state(self._device)} if self._device.type == "cuda" else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the generator where it, or that of another device, was."""
        if "device" in state_dict:
            torch.cuda.set_rng_state(state_dict["device"], self._device)


@contextlib.contextmanager
def preserved_streams(*, devices: bool = False) -> Iterator[None]:
    """Put the global generators back to where they were, whatever the block draws.

    Args:
        devices: Whether the block may draw on accelerators, too; reading their state waits for them.
    """
    streams = RandomStreams(devices=devices)
    before = streams.state_dict()
    try:
        yield
    finally:
        streams.load_state_dict(before)


@contextlib.contextmanager
def streams_seeded(seed: int) -> Iterator[None]:
    """Seed the host's global generators for the block, and put them back to where they were after it."""
    python, host = random.getstate(), torch.default_generator.get_state()
    with _numpy.set_aside():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            torch.default_generator.set_state(host)


class NumpyStream:
    """NumPy's global generator, in whose place another can stand: that takes a tenth of the time of a copy.

    NumPy draws normal numbers in pairs, keeps the second, and forgets it where generators change places.
    """

    WORDS = 625 * 4
    """Bytes of a Mersenne twister: 624 words, and where it is in them."""

    def __init__(self) -> None:
        """Leave the generator alone."""
        self._spare = np.random.MT19937(0)

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Have another generator for the block, to be seeded in it."""
        own = mtrand.get_bit_generator()
        copy = self._copy_if_needed(own)
        mtrand.set_bit_generator(self._spare)
        try:
            yield
        finally:
            mtrand.set_bit_generator(own)
            if copy is not None:
                np.random.set_state(copy)

    def _copy_if_needed(self, own: np.random.BitGenerator) -> dict[str, Any] | None:
        """Return the whole state where a normal number is kept; else `own` has all there is.

        One that is asked for comes from where it is kept, or it moves the generator, which is put back.
        """
        if type(own) is not np.random.MT19937:
            return dict(np.random.get_state(legacy=False))
        words: int = own.ctypes.state_address
        before = ctypes.string_at(words, self.WORDS)
        number = np.random.standard_normal()
        if ctypes.string_at(words, self.WORDS) == before:
            return {**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": number}
        ctypes.memmove(words, before, self.WORDS)
        return None


_numpy = NumpyStream()
