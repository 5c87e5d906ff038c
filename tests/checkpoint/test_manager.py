"""The directory of a run: opening it."""

from pathlib import Path

from typing_extensions import override

from ptacc.checkpoint.manager import CheckpointManager
from ptacc.checkpoint.retention import Retention
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.storage.lock import DirectoryLock
from ptacc.storage.store import CheckpointStore


class SlowToShow(DirectoryLock):
    """A lock whose file, of another host, is not visible until it is read a third time."""

    reads = 0

    @override
    def read(self) -> bytes | None:
        self.reads += 1
        return super().read() if self.reads > 2 else None


def test_a_shared_directory_may_show_new_files_late(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    lock = SlowToShow(store)
    with lock.held():
        CheckpointManager(store, DistributedRuntime(), Retention(), lock).open()
        assert lock.reads == 3
