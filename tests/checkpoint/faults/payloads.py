"""What an attacker puts into a checkpoint: bytes for any file, things in a file's place, states, and manifests."""

import contextlib
import hashlib
import hmac
import io
import json
import marshal
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from ptacc.serialization.safetensors_file import safetensors_parts
from ptacc.storage.manifest import to_json

DEEP = 100_000


class RunsCode:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    @override
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


# ---- bytes, in the place of any file


def of_torch(marker: Path, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save({"model": RunsCode(marker)}, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def of_numpy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([RunsCode(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


RUNNING: Mapping[str, Callable[[Path], bytes]] = {
    "a pickle of protocol 0": lambda marker: pickle.dumps(RunsCode(marker), 0),
    "a pickle": lambda marker: pickle.dumps(RunsCode(marker)),
    "a file of torch": of_torch,
    "an old file of torch": lambda marker: of_torch(marker, zipped=False),
    "an array of NumPy": of_numpy,
    "marshalled code": lambda marker: marshal.dumps(compile(f"import os; os.mkdir({str(marker)!r})", "", "exec")),
    "Python": lambda marker: f"__import__('os').mkdir({str(marker)!r})".encode(),
}
"""What would make the directory `marker`, if anything ran it."""


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file that no library would write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[Any], start: int = 0, end: int = 8, dtype: object = "F32") -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return tensors({"model.0": entry}, bytes(max(0, min(end, 64))))


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BYTES: Mapping[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1 << 16),
    "noise": np.random.default_rng(0).bytes(4096),
    "no JSON": b"{'model': 1}",
    "no parts": b"[1, 2]",
    "JSON in UTF-16": json.dumps({"model": 1}).encode("utf-16"),
    "JSON in UTF-32": json.dumps({"model": 1}).encode("utf-32"),
    "JSON after a mark": b"\xef\xbb\xbf{}",
    "bytes that are no text": b'{"model": "\xff\xfe"}',
    "half a surrogate": b'{"model": "\\ud800", "\\udfff": 1}',
    "control characters": b'{"model": "\\u0000\\u001b[2J"}',
    "deep lists": b'{"model": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep dictionaries": b'{"model": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "lists without an end": b"[" * DEEP,
    "numbers that are none": b'{"model": [NaN, Infinity, -Infinity, 1e999]}',
    "a huge whole number": b'{"model": ' + b"9" * 100_000 + b"}",
    "a long whole number": b'{"model": ' + b"9" * 4000 + b"}",
    "a long fraction": b'{"model": 0.' + b"3" * 1_000_000 + b"}",
    "keys twice": b'{"model": 1, "model": {"~": "tensor", "key": "model.0"}}',
    "a header of 2**60 bytes": tensors({}, length=1 << 60),
    "a header of 2**64 - 1 bytes": tensors({}, length=(1 << 64) - 1),
    "a header beyond the end": tensors({}, length=3),
    "a header without an end": tensors(b'{"model.0": {"dtype": "F32", "shape": ['),
    "a shape that overflows": tensor([1 << 32, 1 << 32, 1 << 32]),
    "a shape that wraps to the right size": tensor([(1 << 61) + 1, 2], 0, 8),
    "no elements in huge dimensions": tensor([0, 1 << 62, 1 << 62], 0, 0),
    "no elements in a dimension of 2**64 - 1": tensor([0, (1 << 64) - 1], 0, 0),
    "a negative dimension": tensor([-2]),
    "a hundred thousand dimensions": tensor([1] * DEEP + [2]),
    "a tensor of 2**60 bytes": tensor([1 << 58], 0, 1 << 60),
    "a tensor before its file": tensor([2], -8, 0),
    "a tensor that ends before it starts": tensor([2], 8, 0),
    "a tensor of objects": tensor([1], dtype="O"),
    "a tensor of half bytes": tensor([16], dtype="F4"),
    "a dtype that is a list": tensor([2], dtype=["F32"]),
    "tensors in one place": tensors({"model.0": WHOLE, "model.1": WHOLE}, bytes(8)),
    "a tensor's key twice": tensors(json.dumps({"a": WHOLE})[:-1].encode() + b', "a": ' + json.dumps(WHOLE).encode()),
    "a deep header": tensors(b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "deep metadata": tensors(b'{"__metadata__": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}"),
    "half a surrogate in a header": tensors(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
    "no tensors": tensors({}),
}


# ---- things, in the place of any file


def linked_to(target: Callable[[Path, Path], Path]) -> Callable[[Path, Path], None]:
    def place(outside: Path, path: Path) -> None:
        to = target(path, outside)
        path.unlink()
        path.symlink_to(to)

    return place


def moved_out(path: Path, outside: Path) -> Path:
    """Copy a file out, so that a link to the copy leads to what the manifest says."""
    (outside / path.name).write_bytes(path.read_bytes())
    return outside / path.name


def hard_link(outside: Path, path: Path) -> None:
    path.unlink()
    path.hardlink_to(outside / "secret")


def pipe(outside: Path, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def listener(outside: Path, path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's path may not be long
        os.close(here)


def directory(outside: Path, path: Path) -> None:
    path.unlink()
    (path / path.name).mkdir(parents=True)


THINGS: Mapping[str, Callable[[Path, Path], None]] = {
    "a link to the very content": linked_to(moved_out),
    "a link to a secret": linked_to(lambda path, outside: outside / "secret"),
    "a link upwards": linked_to(lambda path, outside: Path("../../../outside/secret")),
    "a link to the other checkpoint's": linked_to(lambda path, outside: Path("../step-1") / path.name),
    "a link to nothing": linked_to(lambda path, outside: outside / "nothing"),
    "a link to itself": linked_to(lambda path, outside: path),
    "a link to a directory": linked_to(lambda path, outside: outside),
    "a link to /dev/zero": linked_to(lambda path, outside: Path("/dev/zero")),
    "a link to memory": linked_to(lambda path, outside: Path("/proc/self/mem")),
    "a pipe": pipe,
    "a socket": listener,
    "a directory": directory,
}


# ---- values, in the place of anything in a state or in a manifest

TENSORS = b"".join(safetensors_parts({"model.0": torch.zeros(2), "bytes": torch.zeros(8, dtype=torch.uint8)}))
"""What the keys in hostile states may lead to."""
TENSOR = {"~": "tensor", "key": "model.0"}
VALUES: tuple[object, ...] = (
    *(None, True, 0, -1, 8, 1.5, -0.0, 1 << 31, 1 << 63, (1 << 63) - 1, 1 << 64, -(1 << 70), 10**400, 10**4000),
    *("", "~", "x", "ab", "1j", "1e5", "NaN", "\0", "\u00e9", "\ud800", "\x1b[2J", "x" * 100_000, "9" * 5000),
    # names of files
    *("..", ".", "/", "a/b", "../../../outside/secret", "../outside", "/etc/passwd", "step-2/."),
    *("step-2\0", "step-2\n", "../step-1/shared.json", "shared.json/../shared.json", ".hidden", "-rf", "a\\b", "C:\\x"),
    "x" * 300,
    # tags, dtypes and devices
    *("pickle", "object", "__reduce__", "__class__", "eval", "os", "Tensor", "tensor\0", "__import__('os')", "tuple"),
    *("O", "V8", "M8[ns]", "<m8", "<U4", "|S4", "a8", "?", "<f3", "<f16", "<c32", "T", "i4,i4", "(2,2)<f4", "(,)f4"),
    *("((((f4", "f4," * 1000, "<f99999999999", "numpy:object_", "float", "torch.float32", "numpy.void", "int1"),
    *("moon", "meta", "mkldnn", "cuda:-1", "cuda:01", "cuda:99999999999999999999", "cpu:0:0", "privateuseone:3"),
    # shapes and items
    *([], {}, [[]], [{}], [None], [True], [8], [8.0], ["8"], [[8]], [-1], [-2], [-1, -1], [1] * 70, [0, 1 << 62]),
    *([1 << 62] * 2, [1 << 32] * 3, [1 << 63], [1 << 70], [10**400], [10**400, 0], [0, 10**400], [1, 2, 3], ["ab"]),
    *([1], [[1]], [[1, 2]], [[1, 2, 3]], [[[], 1]], [[{}, 1]], [[TENSOR, 1]], [["a", 1], ["a", 2]], [[1, "x"]]),
    *({"a": 1}, {"1j": 1}, {"~": None}, {"~": {}}, {"~": []}, {"~": "pickle", "items": []}),
    *({"names": ["a"], "formats": ["O"]}, [["a", "O"]], {"sha256": "0" * 64, "size": 1 << 60}),
    # tagged, where there is no tag to be
    *(TENSOR, [TENSOR], [TENSOR, TENSOR], {"~": "float", "value": "nan"}, [{"~": "float", "value": "inf"}]),
    *({"~": "tuple", "items": [[]]}, [{"~": "tuple", "items": [[]]}], [{"~": "Counter", "items": [["loss", 1]]}]),
    [{"~": "array", "key": "model.0", "dtype": "|u1", "shape": [-1]}],
)  # fmt: skip
TAGGED: tuple[Mapping[str, object], ...] = (
    *({"~": "tensor", "key": "model.0"}, {"~": "float", "value": "inf"}, {"~": "complex", "value": [1.0, 2.0]}),
    *({"~": "bytes", "value": "AAAA"}, {"~": "dtype", "value": "float32"}, {"~": "device", "value": "cpu"}),
    *({"~": name, "key": "model.0", "dtype": "|u1", "shape": [8]} for name in ("array", "number")),
    *({"~": name, "items": [[1, 2], [2, 3]]} for name in ("dict", "Counter", "OrderedDict")),
    *({"~": name, "items": [1, 2]} for name in ("tuple", "Size", "set", "frozenset")),
    {"~": "shard", "key": "model.0", "shape": [4], "ranges": [[[0, 2]]], "placements": ["S(0)"], "mesh": ["dp_shard"]},
)
"""A state of each kind, to put values into."""
TEXTS = (
    *('{"~": "tensor", "~": "pickle", "key": "model.0"}', '{"~": "pickle", "~": "tensor", "key": "model.0"}'),
    *("[NaN, Infinity, -Infinity, 1e999, -0.0]", '{"~": "dict", "items": [[NaN, 1], [NaN, 2]]}', '{"a": 1, "a": 2}'),
    *("9" * 4000, "9" * 5000, "0." + "3" * 1_000_000, "1e" + "9" * 100_000, '"\\ud800"', '"\\udfff\\ud800"'),
)
"""States as JSON that Python would not write."""
WITHIN = (
    '{"model": %s}',
    '{"model": {"weights": [1, %s]}}',
    '{"model": {"~": "set", "items": [%s]}}',
    '{"model": {"~": "dict", "items": [[1, %s]]}}',
    '{"model": {"~": "dict", "items": [[%s, 1]]}}',
    '{"model": {"~": "Size", "items": [%s, 1]}}',
    '{"model": {"~": "complex", "value": [%s, 1]}}',
)
"""Where in a file of parts a state may be."""
BRACKETS = (
    *(
        ("[", "]"),
        ('{"a":', "}"),
        ('{"~":', "}"),
        ('{"~":"tuple","items":[', "]}"),
        ('{"~":"dict","items":[[', ",1]]}"),
    ),
    *(('{"~":"tensor","key":', "}"), ('{"~":"complex","value":[', ",1]}"), ('{"~":"frozenset","items":[', "]}")),
    *(('{"~":"array","key":"model.0","dtype":"|u1","shape":[', "]}"),),
    *(('{"~":"array","key":"model.0","shape":[8],"dtype":[', "]}"),),
)
"""What can be in itself."""


def spoiled(whole: object) -> Iterator[object]:
    """Yield a value with each of `VALUES` in the place of each of its parts, and without each of them."""
    yield from VALUES
    if not isinstance(whole, dict):
        return
    for key, part in whole.items():
        yield {name: value for name, value in whole.items() if name != key}
        yield from (whole | {key: other} for other in spoiled(part))


# ---- manifests


def sealed(content: object, key: bytes | None = None, others: Mapping[str, object] | None = None) -> bytes:
    """Return a manifest's file with the right hash of whatever is in it, as an attacker writes it."""
    text = to_json(content)  # type: ignore[arg-type]
    seal = {} if key is None else {"hmac": hmac.new(key, text, hashlib.sha256).hexdigest()}
    return to_json({"manifest": content, "sha256": hashlib.sha256(text).hexdigest()} | seal | {**(others or {})})


def read_content(checkpoint: Path) -> dict[str, Any]:
    """Return what is in a manifest."""
    content: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_bytes())["manifest"]
    return content


def reseal(checkpoint: Path, key: bytes | None = None) -> None:
    """Write the hash and the size of everything that is there now into the manifest."""
    content = read_content(checkpoint)
    content["files"] = {name: described(checkpoint / name) for name in content["files"]}
    (checkpoint / "manifest.json").write_bytes(sealed(content, key))


def described(path: Path) -> dict[str, object]:
    """Return the hash and the size of a file, where its links lead; of what cannot be hashed, a hash."""
    size = path.stat().st_size if path.exists() else 0
    data = b""
    with contextlib.suppress(OSError):  # such as of /proc/self/mem
        data = path.read_bytes() if path.is_file() else b""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": size}
