"""The ranks of a tensor-parallel worker: how they meet, and how they leave together.

Ranks meet through torch.distributed's rendezvous. `tandem-worker --tp-size N` becomes rank 0 and starts the other ranks
itself, on this host. Under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...) each process is told its rank, on any host.
When one rank is lost, the whole group ends: all processes exit, and the scheduler goes on with the next worker.
"""

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.host.private_folder import PrivateFolder
from tandem_shared.host.process import child_environment, die_with_parent, end_with_parent
from tandem_shared.options import to_arguments
from tandem_worker.device import device_of
from tandem_worker.ranks.group_failure import fail
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners.runner import Runner

LEAVE_LIMIT_S = 15.0
"""The longest time that ranks wait for each other at the end."""
LOOPBACK = "127.0.0.1"
STORE_VARIABLE = "RANK_STORE"
"""The environment variable that tells a rank started by rank 0 the file where the group meets."""


@dataclass(frozen=True)
class Rank:
    """A process's place in its group."""

    shard: Shard
    local_rank: int
    """The rank's number on its host, which is that of its GPU"""
    store: Store
    children: tuple["subprocess.Popen[bytes]", ...] = ()
    """The other ranks, where this process has started them"""


def join_group(settings: WorkerSettings, parent_pid: int) -> Rank:
    """Waits until all ranks have met; gives this process's rank. Starts the other ranks, unless a launcher or rank 0
    has started this process as one.

    parent_pid: the process's parent when it began. Raises ConfigError where this host has no GPU for the rank.
    """
    environment = os.environ
    if STORE_VARIABLE in environment:
        store = FileStore(environment[STORE_VARIABLE], settings.tp_size)
        rank = Rank(Shard(int(environment["RANK"]), settings.tp_size), int(environment["LOCAL_RANK"]), store)
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        if "TORCHELASTIC_RUN_ID" in environment and sys.platform == "linux":
            # A torchrun that is killed can't end its processes.
            end_with_parent(parent_pid)
        store, number, size = next(rendezvous("env://"))
        rank = Rank(Shard(number, size), int(environment.get("LOCAL_RANK", 0)), store)
    else:
        rank = _start_group(settings)
    is_on_gpu = device_of(settings).type == "cuda"
    if is_on_gpu:
        if rank.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank.shard.rank} needs GPU {rank.local_rank}; torch finds {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(rank.local_rank)
    dist.init_process_group(
        "nccl" if is_on_gpu else "gloo",
        store=PrefixStore("collectives", rank.store),
        rank=rank.shard.rank,
        world_size=rank.shard.size,
    )
    return rank


def leave_group(runner: Runner) -> None:
    """Ends the runner, then the process group. All ranks do this at the same time; the process fails where one of them
    does not.
    """
    limit = threading.Timer(LEAVE_LIMIT_S, fail, ["its ranks did not end together"])
    limit.daemon = True
    limit.start()
    runner.close()
    dist.destroy_process_group()
    limit.cancel()


def _start_group(settings: WorkerSettings) -> Rank:
    """Starts the other ranks on this host; gives rank 0. Ranks meet in a folder that only this user may read, not on a
    port.
    """
    folder = PrivateFolder("tandem-ranks-")
    atexit.register(folder.close)
    variables = {STORE_VARIABLE: f"{folder.path}/store", "WORLD_SIZE": str(settings.tp_size)}
    os.environ["LOCAL_WORLD_SIZE"] = variables["LOCAL_WORLD_SIZE"] = str(settings.tp_size)
    if sys.platform == "linux":
        # Over the loopback interface no host name needs to be resolved.
        os.environ["GLOO_SOCKET_IFNAME"] = variables["GLOO_SOCKET_IFNAME"] = "lo"
    children = tuple(_start_rank(settings, number, variables) for number in range(1, settings.tp_size))
    for number, child in enumerate(children, 1):
        threading.Thread(target=_watch_child, args=[number, child], daemon=True).start()
    return Rank(Shard(0, settings.tp_size), 0, FileStore(variables[STORE_VARIABLE], settings.tp_size), children)


def _start_rank(settings: WorkerSettings, number: int, variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tandem_worker", *to_arguments(settings)],
        env={**child_environment(), **variables, "RANK": str(number), "LOCAL_RANK": str(number)},
        # The terminal's signals must not reach the rank: rank 0 ends it.
        start_new_session=True,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )


def _watch_child(number: int, child: "subprocess.Popen[bytes]") -> None:
    status = child.wait()
    if status != 0:
        fail(f"rank {number} (process {child.pid}) ended with status {status}")
