"""Tensors in the safetensors format, written piece by piece so that a file can be hashed while it is written.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.serialization.json_codec import one_line
from ptacc.tensors.structures import as_bytes


def safetensors_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file. Tensors on the host are not copied."""
    header = safetensors_header(tensors)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in sort_names(tensors):
        yield as_bytes(tensors[name])


def safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the header of a safetensors file; raise `CheckpointError` for a dtype that the format does not have."""
    header, start = dict[str, object](), 0
    for name in sort_names(tensors):
        tensor = tensors[name]
        dtype = safetensors_dtype(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} is a tensor of {tensor.dtype}, which safetensors cannot store: convert it.")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # so that the tensors are aligned


@functools.cache
def safetensors_dtype(dtype: torch.dtype) -> str | None:
    """Return what safetensors calls a dtype, None for one that it cannot write and read."""
    try:
        file = save({"": torch.empty(0, dtype=dtype, device="cpu")})
        load(file)
    except Exception:  # noqa: BLE001  # which one depends on the dtype
        return None
    name: str = json.loads(file[8:])[""]["dtype"]
    return name


def is_storable(value: object) -> bool:
    """Return whether a value is a tensor that a file can store: dense, with data, and of a dtype of the format."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return False
    return safetensors_dtype(value.dtype) is not None


def sort_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of writing, in which each tensor is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def parse_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Return the tensors in the content of a file, or raise `DamagedCheckpointError`."""
    try:
        return load(data)
    except MemoryError:
        raise
    except Exception as error:  # safetensors checks most of a header, and torch fails on the rest
        raise DamagedCheckpointError(f"{name} is not a safetensors file: {one_line(error)}.") from error
