"""The manifest: what a checkpoint is, and the hash of each of its files. It is written last, and checked first.

A hash protects from damage, and not from people: whoever can write the files can write their hashes. With a key, the
manifest is signed (HMAC-SHA256), and one that was not signed with that key is refused.
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

from ptacc.checkpoint.serialization.json_codec import Encoded, brief, decode, encode
from ptacc.checkpoint.storage.filesystem import Written
from ptacc.errors import CheckpointError, DamagedCheckpointError

FORMAT: Final = 1
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")
"""Names that a file of a checkpoint may have: none that leads elsewhere."""
LARGEST: Final = 1 << 24
"""Bytes that a manifest may have: those of fifty thousand processes."""
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
"""A SHA-256, or an HMAC made with it."""
LARGEST_COUNT: Final = 2**63 - 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Args:
        name: The name of its directory.
        run: The identity of the run.
        step: Optimizer steps completed.
        epoch: Epochs completed.
        offset: What the processes trained on of the present epoch's data, together: samples, or batches of a loader.
        world_size: Number of processes.
        sequence: Its number among the checkpoints of its directory, in the order in which they were saved.
        label: What it was saved for, where somebody said so.
        parts: The version of each part's state, by the part's name.
        metrics: The values that the last evaluations reported, by name.
        files: Hash and size of each file, by its name.
    """

    name: str
    run: str
    step: int
    epoch: int
    offset: int
    world_size: int
    sequence: int = 0
    label: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Written] = field(default_factory=dict)

    def to_bytes(self, key: bytes | None = None) -> bytes:
        """Return the bytes of the manifest's file: the one way in which this manifest is written.

        Args:
            key: Signs it.
        """
        content = self.content()
        return sealed(content, None if key is None else hmac.new(key, serialised(content), hashlib.sha256).hexdigest())

    def content(self) -> dict[str, Any]:
        """Return what is hashed and signed."""
        return {"format": FORMAT, **asdict(self), "metrics": encode(dict(self.metrics)).tree}

    @classmethod
    def from_bytes(cls, data: bytes, key: bytes | None = None) -> Manifest:
        """Read a manifest.

        Args:
            data: The bytes of its file.
            key: What it has to be signed with, if given.

        Raises:
            DamagedCheckpointError: These bytes are not, to the last one, what `to_bytes` wrote.
            CheckpointError: It is of a later format, or not signed with `key`.
        """
        try:
            document = json.loads(data)
            content: dict[str, Any] = dict(document["manifest"])
            version = content.pop("format")
            if type(version) is int and version > FORMAT:
                raise CheckpointError(
                    f"The checkpoint is of format {reprlib.repr(version)}, and this ptacc reads {FORMAT}: update it."
                )
            content["metrics"] = decode(Encoded(content["metrics"]))
            content["files"] = {str(name): Written(**file) for name, file in content["files"].items()}
            manifest = cls(**content)
            manifest.check()
            # Without a key, nobody here can say whether a signature is right.
            written = sealed(manifest.content(), document.get("hmac")) if key is None else manifest.to_bytes(key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"The manifest is none: {brief(error)}.") from error
        if key is not None and not hmac.compare_digest(written, data):
            raise CheckpointError(f"{manifest.name} is not signed with the key that was given, or was changed since.")
        if written != data:
            raise DamagedCheckpointError(f"The manifest of {manifest.name} is not what was written: its hash differs.")
        return manifest

    def check(self) -> None:
        """Raise `ValueError` for values that no manifest has."""
        texts = (self.name, self.run, self.label, *self.parts, *self.metrics)
        counts = (self.step, self.epoch, self.offset, self.world_size, self.sequence, *self.parts.values())
        sizes = [file.size for file in self.files.values()]
        if not all(type(text) is str for text in texts):
            raise ValueError("a name is no text")
        if not all(is_count(count) for count in (*counts, *sizes)):
            raise ValueError("a count is no count")
        if not all(
            type(value) is float or (type(value) is int and is_count(abs(value))) for value in self.metrics.values()
        ):
            raise ValueError("a metric is no number")
        if not all(DIGEST.fullmatch(file.sha256) for file in self.files.values()):
            raise ValueError("a hash is no hash")
        for name in (self.name, *self.files):
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a file")


def is_count(value: object) -> bool:
    """Whether a value is one that things are counted with, and is no absurd one."""
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def sealed(content: Mapping[str, Any], signature: str | None) -> bytes:
    """Return the bytes of a manifest's file."""
    seal = {"sha256": hashlib.sha256(serialised(content)).hexdigest()}
    return serialised({"manifest": content, **seal, **({} if signature is None else {"hmac": signature})})


def serialised(content: Mapping[str, Any]) -> bytes:
    """Return JSON in one form: the same bytes for equal content."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
