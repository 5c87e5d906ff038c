"""Two hosts on this machine: network namespaces with an address and a name each, joined by a cable."""

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
    def cable(self) -> str:
        return f"pt{os.getpid()}.{self.number}"  # at most 15 characters

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for its processes: gloo would ask for the address of the host's name, which nobody knows."""
        return {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": self.cable}

    def command(self, *command: str) -> tuple[str, ...]:
        """Return a command as it is run here."""
        named = ("unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh")
        return ("ip", "netns", "exec", self.name, *named, *command)


HOSTS = (Host(0), Host(1))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


def build_hosts() -> None:
    for host in HOSTS:
        ip("netns", "add", host.name)
    cable = ("link", "add", HOSTS[0].cable, "netns", HOSTS[0].name, "type", "veth")
    ip(*cable, "peer", "name", HOSTS[1].cable, "netns", HOSTS[1].name)
    for host in HOSTS:
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
        ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", host.name, "link", "set", host.cable, "up")
    subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, text=True, timeout=10)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Have the hosts for the block; skip the test where there can be none."""
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
                ip("netns", "delete", host.name)  # and its end of the cable
