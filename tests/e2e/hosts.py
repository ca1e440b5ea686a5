"""Hosts of a network of their own on this machine: Linux network namespaces, joined by veth pairs.

A namespace lives as long as its holder, a process that sleeps; with it go its interfaces, addresses and rules. Making
one takes root, or rights that containers often lack: why_no_hosts() says so.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.e2e.waiting import wait_until

PROGRAMS = ("ip", "iptables", "nsenter", "unshare")
"""Of Debian's packages iproute2, iptables and util-linux."""
LIFE_S = 3600
"""A namespace whose test was killed is gone after so long."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def entering(holder: int) -> list[str]:
    """What to put before a command that is to run in the holder's network."""
    return ["nsenter", "--target", str(holder), "--net"]


@contextmanager
def network_namespaces(count: int) -> Iterator[list[int]]:
    """The holders' process ids."""
    own = os.readlink("/proc/self/ns/net")
    with ExitStack() as stack:
        holders: list[int] = []
        for _ in range(count):
            holder = subprocess.Popen(["unshare", "--net", "sleep", str(LIFE_S)])
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            wait_until(lambda pid=holder.pid: os.readlink(f"/proc/{pid}/ns/net") != own, "a network namespace", 10)
            holders.append(holder.pid)
        yield holders


class Host:
    """A host that this machine reaches over one link, on which packets can be dropped without a word."""

    DIRECTIONS = ("INPUT", "OUTPUT")

    def __init__(self, holder: int) -> None:
        self.enter = entering(holder)
        # A network of four addresses for each process id, of its last 14 bits.
        network = f"10.98.{holder // 64 % 256}"
        here, there = (f"{network}.{holder % 64 * 4 + number}" for number in (1, 2))
        self.address = there
        name, peer = f"tdh{holder}", f"tdw{holder}"
        ip("link", "add", name, "type", "veth", "peer", "name", peer, "netns", str(holder))
        ip("addr", "add", f"{here}/30", "dev", name)
        ip("link", "set", name, "up")
        for command in (
            ["addr", "add", f"{there}/30", "dev", peer],
            ["link", "set", peer, "up"],
            ["link", "set", "lo", "up"],
        ):
            self._run("ip", *command)

    def drop(self, directions: Sequence[str] = DIRECTIONS) -> None:
        """Drops all packets that come in or go out, from now on."""
        for chain in directions:
            self._drop(chain)

    def drop_connections(self, peer_ports: Sequence[int]) -> None:
        """Drops all packets of the connections from these ports, from now on."""
        for port in peer_ports:
            self._drop("INPUT", "--protocol", "tcp", "--sport", str(port))
            self._drop("OUTPUT", "--protocol", "tcp", "--dport", str(port))

    def recover(self) -> None:
        for chain in self.DIRECTIONS:
            self._run("iptables", "--wait", "--flush", chain)

    def _drop(self, chain: str, *which: str) -> None:
        self._run("iptables", "--wait", "--append", chain, *which, "--jump", "DROP")

    def _run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True, capture_output=True, text=True)


@contextmanager
def one_host() -> Iterator[Host]:
    with network_namespaces(1) as [holder]:
        yield Host(holder)


def why_no_hosts() -> str:
    """Why hosts can't be made here; empty where they can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs {', '.join(missing)}"
    try:
        with one_host() as host:
            host.drop()
            host.recover()
    except (OSError, subprocess.CalledProcessError, AssertionError) as error:
        return f"may not make network namespaces with rules here: {getattr(error, 'stderr', '') or error}"
    return ""
