"""The directory of a run: opening it."""

from pathlib import Path

from typing_extensions import override

from ptacc.checkpoint.manager import TOKEN, CheckpointManager
from ptacc.checkpoint.retention import Retention
from ptacc.checkpoint.storage.store import CheckpointStore
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.files.filesystem import FileSystem


class SlowToShow(FileSystem):
    """Shows a file of another host only when it is looked for a third time."""

    looks = 0

    @override
    def exists(self, path: str) -> bool:
        self.looks += TOKEN in path
        return self.looks > 2 and super().exists(path)


def test_a_shared_directory_may_show_new_files_late(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), filesystem=SlowToShow())
    CheckpointManager(store, DistributedRuntime(), Retention()).open()
    assert [*tmp_path.iterdir()] == []
