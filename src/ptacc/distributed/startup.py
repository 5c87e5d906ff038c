"""The first contact of the ranks of a launch, with a timeout and the names of missing ranks.

torch waits 30 minutes for a rank that was never started, or that does not create its trainer, and does not name it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from ptacc.errors import LaunchError

TIMEOUT_VARIABLE = "PTACC_STARTUP_SECONDS"
TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.02
_launches = count()


@contextlib.contextmanager
def all_ranks_started() -> Generator[None]:
    """Wait until all ranks of the launch are here; connect them within the block. A collective.

    Raises:
        LaunchError: A rank did not arrive within `PTACC_STARTUP_SECONDS`, 300 by default.
    """
    environment = os.environ
    world_size = int(environment.get("WORLD_SIZE") or 1)
    if dist.is_initialized() or world_size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        yield
        return
    rank, seconds = int(environment["RANK"]), float(environment.get(TIMEOUT_VARIABLE) or TIMEOUT_SECONDS)
    deadline = time.monotonic() + seconds
    address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    launch = f"{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_launches)}"
    try:
        # torch's own store shares the server, which lives as long as one of its stores does.
        store = TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set(f"started/{launch}/{rank}", "")
        missing = list(range(world_size))
        while missing := [other for other in missing if not store.check([f"started/{launch}/{other}"])]:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"Rank {rank} waited {seconds:g} s for ranks {missing} of {world_size}. Check that every process "
                    f"was started, and that each of them uses its trainer. Set {TIMEOUT_VARIABLE} to wait longer."
                )
            time.sleep(POLL_SECONDS)
    except dist.DistError as error:
        raise LaunchError(
            f"Rank {rank} got no answer from {address} within {seconds:g} s: rank 0 or the launcher is not running."
        ) from error
    yield
