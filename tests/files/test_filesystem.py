"""Writing, reading and naming files on a local disk."""

import hashlib
from pathlib import Path

import pytest

from ptacc.errors import DamagedCheckpointError, OptionError
from ptacc.files.filesystem import CHUNK_SIZE, PARALLEL_HASH_SIZE, FileDigest, FileSystem
from ptacc.files.paths import expand_path


def test_the_digest_of_a_file_is_that_of_its_parts_of_any_size(tmp_path: Path) -> None:
    parts: list[bytes | memoryview] = [b"a" * (2 * CHUNK_SIZE + 1), b"", b"b", memoryview(b"c" * PARALLEL_HASH_SIZE)]
    digest = FileSystem().write_file(str(tmp_path / "file"), parts)
    content = b"".join(parts)
    assert (tmp_path / "file").read_bytes() == content
    assert digest == FileDigest(hashlib.sha256(content).hexdigest(), len(content))
    assert FileSystem().hash_file(str(tmp_path / "file"), len(content)) == digest.sha256


def test_a_path_that_cannot_be_looked_up_is_not_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        FileSystem().exists(str(tmp_path / ("x" * 300)))


def test_a_file_of_unknown_size_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert FileSystem().read_at_most(str(path), 5) == b"12345"
    with pytest.raises(DamagedCheckpointError, match="larger than the limit of 4 bytes"):
        FileSystem().read_at_most(str(path), 4)


def test_the_home_of_an_unknown_user_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'~nobody-of-this-name/runs': .*Write './~nobody-of-this-name/runs'"):
        expand_path("~nobody-of-this-name/runs")
