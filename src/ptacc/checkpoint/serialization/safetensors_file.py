"""Tensors in files: the safetensors format, written part by part so that it can be hashed on the way.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import load
from torch import Tensor

from ptacc.checkpoint.serialization.json_codec import brief
from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.tensors.structures import as_bytes

NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""What the format calls torch's dtypes."""
ALIGNMENT = 8


def safetensors_parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, each tensor without a copy where it is on the host already.

    Raises:
        CheckpointError: A tensor of a dtype that the format does not have.
    """
    text = safetensors_header(tensors)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in in_order(tensors):
        yield as_bytes(tensors[name])


def safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the header of a safetensors file, which says of each tensor what and where it is.

    Raises:
        CheckpointError: A tensor of a dtype that the format does not have.
    """
    header: dict[str, object] = {}
    offset = 0
    for name in in_order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{name} is a tensor of {tensor.dtype}, which safetensors cannot store: convert it.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order in which their tensors are written: each is aligned then."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def parse_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a file.

    Raises:
        DamagedCheckpointError: They are no safetensors file.
    """
    try:
        return load(data)
    except MemoryError:
        raise
    except Exception as error:  # safetensors checks much of a header, and leaves torch to refuse the rest
        raise DamagedCheckpointError(f"{name} is no safetensors file: {brief(error)}.") from error
