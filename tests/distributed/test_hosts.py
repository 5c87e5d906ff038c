"""`accelerate launch` on two hosts, which are network namespaces of this machine."""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from ptacc.testing import epoch_order, tiny_parts
from tests.distributed.hosts import HOSTS, Host, two_hosts
from tests.distributed.scripts import tiny
from tests.ranks import launch

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent
SECONDS = 20.0
SETTINGS = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[None]:
    with two_hosts():
        yield


def run(host: Host, processes: int, script: str, *arguments: str) -> tuple[CompletedProcess[str], float]:
    """Launch a script with `processes` on one of two hosts, and return the ended command and its time in seconds."""
    machines = ("--num_machines", "2", "--machine_rank", str(host.number), "--num_processes", str(2 * processes))
    rendezvous = ("--main_process_ip", HOSTS[0].address, "--main_process_port", "29500")
    accelerate = (str(BIN / "accelerate"), "launch", "--multi_gpu", *machines, *rendezvous, *SETTINGS)
    started = time.monotonic()
    ended = launch(host.command(*accelerate, str(SCRIPTS / script), *arguments), env=host.environment, timeout=60)
    return ended, time.monotonic() - started


def run_on_both(processes: int, script: str, *arguments: str) -> list[tuple[CompletedProcess[str], float]]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda host: run(host, processes, script, *arguments), HOSTS))


@dataclass(frozen=True)
class Report:
    """The report of rank 0."""

    world_size: int
    values: dict[str, Any]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.prove)], ids=["1 each", "2 each"])
def report(request: pytest.FixtureRequest) -> Report:
    (first, _), (second, _) = run_on_both(request.param, "tiny.py")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == ""
    return Report(2 * request.param, json.loads(first.stdout))


def test_two_hosts_give_the_numbers_of_one_process(report: Report) -> None:
    alone = tiny.report(tiny.Seeing(**tiny_parts()))
    assert report.values["world_size"] == report.world_size
    for key in alone.keys() - {"world_size", "seen"}:
        assert report.values[key] == pytest.approx(alone[key], rel=1e-12, abs=0), key


def check_order(seen: list[list[list[int]]], start: int = 0) -> None:
    """Check that the samples of all ranks in each step, from step `start` on, are those of the data order."""
    size, samples = tiny.GLOBAL_BATCH, len(tiny.DATA)
    order = epoch_order(tiny.SEED, 0, samples) + epoch_order(tiny.SEED, 1, samples)
    together = [[place for part in step for place in part] for step in zip(*seen, strict=True)]
    for step, places in enumerate(together, start):
        assert sorted(places) == sorted(order[size * step : size * (step + 1)])
    assert (start + len(together)) * size == len(order)


def test_two_hosts_share_each_batch_of_the_data_order(report: Report) -> None:
    assert len(report.values["seen"]) == report.world_size
    check_order(report.values["seen"])


@pytest.mark.parametrize("start", [4, pytest.param(2, marks=pytest.mark.prove)])
def test_the_data_order_continues_from_a_step_within_an_epoch(start: int, report: Report) -> None:
    (first, _), (second, _) = run_on_both(report.world_size // 2, "tiny.py", str(start))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    rest = json.loads(first.stdout)
    check_order(rest, start)
    assert rest == [seen[start:] for seen in report.values["seen"]]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.prove)])
def test_an_exception_on_one_host_is_named_on_the_other(rank: int) -> None:
    ended, seconds = run_on_both(1, "failing.py", "raises", str(rank))[1 - rank]
    assert ended.returncode != 0
    assert f"RankFailedError: rank {rank} failed" in ended.stderr
    assert "KeyError: 'on purpose'" in ended.stderr
    assert seconds < SECONDS


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.prove)])
def test_a_process_killed_on_one_host_is_lost_by_name_on_the_other(rank: int) -> None:
    ended, seconds = run_on_both(1, "failing.py", "dies", str(rank))[1 - rank]
    assert ended.returncode != 0
    assert f"RankFailedError: rank {rank} failed at an unknown place: lost: " in ended.stderr
    assert seconds < SECONDS
