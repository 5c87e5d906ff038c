"""Two hosts on this machine: network namespaces, each with an address and a host name, connected by a veth pair."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    number: int

    @property
    def name(self) -> str:
        return f"ptacc{os.getpid()}-{self.number}"

    @property
    def interface(self) -> str:
        return f"pt{os.getpid()}.{self.number}"  # at most 15 characters

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for its processes. Without the interface gloo would resolve the host name, which has no address."""
        return {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": self.interface}

    def command(self, *command: str) -> tuple[str, ...]:
        """Return the command line that runs a command on this host."""
        named = ("unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh")
        return ("ip", "netns", "exec", self.name, *named, *command)


HOSTS = (Host(0), Host(1))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


def build_hosts() -> None:
    for host in HOSTS:
        ip("netns", "add", host.name)
    veth = ("link", "add", HOSTS[0].interface, "netns", HOSTS[0].name, "type", "veth")
    ip(*veth, "peer", "name", HOSTS[1].interface, "netns", HOSTS[1].name)
    for host in HOSTS:
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
        ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", host.name, "link", "set", host.interface, "up")
    subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, text=True, timeout=10)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Create the hosts for the block; skip the test where that is impossible."""
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)}: Debian's iproute2, util-linux and hostname")
    try:
        try:
            build_hosts()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two hosts need network namespaces, and {error.cmd} failed: {error.stderr.strip()}")
        yield
    finally:
        for host in HOSTS:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host.name)  # with its interface
