"""The manifest: describes a checkpoint, with the hash of each of its files. It is written last and checked first.

Hashes protect against damage, not against attackers: who can write the files can write their hashes. With a key, the
manifest is signed (HMAC-SHA256), and a manifest that is not signed with the key is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.filesystem import FileDigest
from ptacc.serialization.json_codec import Encoded, decode, encode, one_line

FORMAT: Final = 1
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
"""The valid names of checkpoints and their files. None leads to another directory."""
MAX_MANIFEST_SIZE: Final = 1 << 24
"""In bytes; enough for fifty thousand processes."""


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint.

    Args:
        name: Of the checkpoint and its directory.
        step: Optimizer steps completed.
        epoch: Epochs completed.
        offset: How much of the current epoch's data has been used, over all processes: samples, or batches of a loader.
        sequence: Position among the checkpoints of the directory, in the order in which they were saved.
        label: What it was saved for; empty if no label was given.
        parts: The names of the parts that all ranks share.
        metrics: The values of the last evaluations, by name.
        files: The digest of each file, by the name of the file.
    """

    name: str
    run: str
    step: int
    epoch: int
    offset: int
    world_size: int
    sequence: int = 0
    label: str = ""
    parts: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    def to_bytes(self, key: bytes | None = None, signature: str | None = None) -> bytes:
        """Return the content of the manifest's file, which is deterministic. A key replaces the given signature."""
        content = {"format": FORMAT, **asdict(self), "metrics": encode(dict(self.metrics)).tree}
        data = to_json(content)
        if key is not None:
            signature = hmac.new(key, data, hashlib.sha256).hexdigest()
        signed = {} if signature is None else {"hmac": signature}
        return to_json({"manifest": content, "sha256": hashlib.sha256(data).hexdigest(), **signed})

    @classmethod
    def from_bytes(cls, data: bytes, key: bytes | None = None) -> Manifest:
        """Parse a manifest. Check its hash, and its signature if there is a key.

        Raises:
            DamagedCheckpointError: The bytes are not exactly those that `to_bytes` returns.
            CheckpointError: It has a later format, or is not signed with `key`.
        """
        try:
            document = json.loads(data)
            content: dict[str, Any] = dict(document["manifest"])
            version = content.pop("format")
            if type(version) is int and version > FORMAT:
                raise CheckpointError(f"The checkpoint has format {reprlib.repr(version)}: update ptacc to read it.")
            content["metrics"] = decode(Encoded(content["metrics"]))
            content["parts"] = tuple(content["parts"])
            content["files"] = {str(name): FileDigest(**digest) for name, digest in content["files"].items()}
            manifest = cls(**content)
            manifest.check()
            expected = manifest.to_bytes(key, document.get("hmac"))  # without a key, the signature cannot be checked
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"The manifest is invalid: {one_line(error)}.") from error
        if key is not None and not hmac.compare_digest(expected, data):
            raise CheckpointError(f"{manifest.name} is not signed with the key, or was changed afterwards.")
        if expected != data:
            raise DamagedCheckpointError(f"The manifest of {manifest.name} has changed since it was written.")
        return manifest

    def check(self) -> None:
        """Raise `ValueError` for invalid values."""
        sizes = [file.size for file in self.files.values()]
        counts = (self.step, self.epoch, self.offset, self.world_size, self.sequence, *sizes)
        metrics = self.metrics.values()
        if not all(type(text) is str for text in (self.name, self.run, self.label, *self.parts, *self.metrics)):
            raise ValueError("a name is not a string")
        if not all(is_count(count) for count in counts):
            raise ValueError("invalid count")
        if not all(type(value) is float or (type(value) is int and is_count(abs(value))) for value in metrics):
            raise ValueError("a metric is not a number")
        if not all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in self.files.values()):
            raise ValueError("invalid hash")
        for name in (self.name, *self.files):
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"invalid file name {name!r}")


def is_count(value: object) -> bool:
    """Whether a value is an integer that is not negative and has at most 63 bits."""
    return type(value) is int and 0 <= value < 2**63


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys: the same bytes for equal content."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
