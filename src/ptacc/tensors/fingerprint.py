"""Fingerprints of tensors: 64 bits that differ if any bit of a tensor does, computed on the tensor's device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 1 << 18
"""Words of 64 bits that are mixed at a time: they stay in the cache of a CPU, and fill a GPU."""
# The constants of splitmix64, as signed numbers. Source: https://prng.di.unimi.it/splitmix64.c
INCREMENT, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def compute_fingerprint(tensor: Tensor) -> str:
    """Return the fingerprint of a dense tensor, as a hexadecimal number. Reads from the device.

    It depends on the bytes of the tensor, and not on its device, dtype or shape.
    """
    return f"{int(mix_tensor(tensor)) % (1 << 64):016x}"


@torch.no_grad()
def mix_tensor(tensor: Tensor) -> Tensor:
    """Return the fingerprint of a tensor: an int64 scalar on its device. Integers wrap: sums are exact in any order."""
    words = as_words(tensor)
    total = torch.full((), tensor.numel() * tensor.element_size(), dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(words, CHUNK):
        mixed = chunk + make_keys(tensor.device)[: chunk.numel()]  # a word counts at its position
        mixed.bitwise_xor_(mixed >> 30).mul_(FIRST)
        mixed.bitwise_xor_(mixed >> 27).mul_(SECOND)
        total = total * INCREMENT + mixed.bitwise_xor_(mixed >> 31).sum()
    return total


def as_words(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor as words of 64 bits, filled up with zeros. By reference if they are aligned."""
    values = tensor.detach().contiguous()
    data = values.as_strided((values.numel(),), (1,)).view(torch.uint8)  # torch ignores strides of sizes 0 and 1
    if data.numel() % 8 or data.storage_offset() % 8:
        data = pad(data, (0, -data.numel() % 8)).clone()
    return data.view(torch.int64)


@functools.lru_cache(maxsize=4)
def make_keys(device: torch.device) -> Tensor:
    """Return a different number for each position in a chunk."""
    return torch.arange(1, CHUNK + 1, dtype=torch.int64, device=device) * INCREMENT
