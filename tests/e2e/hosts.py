"""Test hosts on this machine, each with a network of its own: Linux network namespaces, joined by veth pairs.

A namespace lives as long as its holder, a sleeping process, and its interfaces, addresses and rules go with it. To make
one takes root, or rights that containers often lack; why_no_hosts() says what is missing.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.e2e.waiting import wait_until

PROGRAMS = ("ip", "iptables", "nsenter", "unshare")
"""The programs used; Debian has them in iproute2, iptables and util-linux."""
LIFE_S = 3600
"""How long a holder sleeps: then a namespace whose test was killed is gone too."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def entering(holder: int) -> list[str]:
    """The words that, put before a command, run it in the holder's network."""
    return ["nsenter", "--target", str(holder), "--net"]


@contextmanager
def network_namespaces(count: int) -> Iterator[list[int]]:
    """Makes namespaces; gives the process ids of their holders."""
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
        # A network of four addresses, chosen by the last 14 bits of the holder's process id.
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
        """From now on, drops all packets that the host receives (INPUT) or sends (OUTPUT)."""
        for chain in directions:
            self._drop(chain)

    def drop_connections(self, peer_ports: Sequence[int]) -> None:
        """From now on, drops all packets of the host's connections with these ports of its peers."""
        for port in peer_ports:
            self._drop("INPUT", "--protocol", "tcp", "--sport", str(port))
            self._drop("OUTPUT", "--protocol", "tcp", "--dport", str(port))

    def recover(self) -> None:
        """Drops no more packets."""
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
