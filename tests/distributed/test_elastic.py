"""Under `torchrun --max-restarts`, a run continues after a process or a host was killed."""

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.distributed.hosts import HOSTS, Host, two_hosts
from tests.ranks import launch

SCRIPT = Path(__file__).parent / "scripts" / "elastic.py"
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
SECONDS = 90
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(
    directory: Path, *deaths: str, restarts: int = 3, environment: Mapping[str, str] = OWN_STORE
) -> CompletedProcess[str]:
    directory.mkdir()
    command = (TORCHRUN, "--nproc-per-node", "2", "--max-restarts", str(restarts), str(SCRIPT), str(directory), *deaths)
    return launch(command, env={"ACCELERATE_USE_CPU": "true", **environment}, timeout=SECONDS)


def result_in(directory: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of a run in which no process is killed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    ended = start(directory)
    assert ended.returncode == 0, ended.stderr
    return result_in(directory)


@pytest.mark.parametrize(
    "deaths", [("4:1",), pytest.param(("0:1", "2:0", "7:1"), marks=pytest.mark.prove)], ids=["once", "three times"]
)
def test_a_run_continues_bit_for_bit_after_its_processes_were_killed(
    tmp_path: Path, deaths: tuple[str, ...], uninterrupted: dict[str, Any]
) -> None:
    ended = start(tmp_path / "run", *deaths)
    assert ended.returncode == 0, ended.stderr
    assert result_in(tmp_path / "run") == {**uninterrupted, "restarts": len(deaths)}


def test_a_launch_whose_restarts_would_fail_raises(tmp_path: Path) -> None:
    ended = start(tmp_path / "run", restarts=1, environment={})
    assert ended.returncode != 0
    assert "LaunchError: torchrun --max-restarts 1" in ended.stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in ended.stderr


@pytest.fixture
def hosts() -> Iterator[None]:
    with two_hosts():
        yield


def start_on(host: Host, directory: Path, *deaths: str) -> CompletedProcess[str]:
    timeouts = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=60"
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0].address}:29500", "--rdzv-id", "elastic")
    settings = ("--rdzv-conf", f"{timeouts},is_host={not host.number}", "--local-addr", host.address)
    agent = (TORCHRUN, "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", *rendezvous, *settings)
    command = host.command(*agent, str(SCRIPT), str(directory), *deaths)
    return launch(command, env=host.environment | OWN_STORE, timeout=SECONDS)


@pytest.mark.usefixtures("hosts")
def test_a_run_continues_after_a_host_was_killed(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda host: start_on(host, tmp_path, "5:1:host"), HOSTS)
    assert second.returncode < 0  # its agent was killed
    assert first.returncode == 0, first.stderr
    result = result_in(tmp_path)
    assert result["world_size"] == 1
    assert result["losses"] == pytest.approx(uninterrupted["losses"], rel=1e-6)
    for actual, expected in zip(result["weights"], uninterrupted["weights"], strict=True):
        assert [*flat(actual)] == pytest.approx([*flat(expected)], rel=1e-5, abs=1e-6)


def flat(values: Any) -> Iterator[float]:
    for value in values:
        yield from flat(value) if isinstance(value, list) else [value]
