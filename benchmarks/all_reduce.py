"""Times all-reduces on one host by message size: one-shot, two-shot and copies over peer memory, and NCCL.

Usage: torchrun --nproc-per-node RANKS -m benchmarks.all_reduce [--out FILE] [--commit COMMIT]

Each is captured in a CUDA graph of REPEATS calls, as in the steps of a runner, and checked against the exact sum.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import header, write_json
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.peer_memory import connect_peers
from tandem_worker.ranks.shard import Shard

SIZES = [1 << exponent for exponent in range(12, 28)]
REPEATS = 20
RUNS = 20
WIDTH = 4096
"""The elements in a row of a message."""


def microseconds(call: Callable[[], object]) -> float:
    """The time of one call: the median over RUNS replays of a graph of REPEATS calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(events))
    return times[RUNS // 2] / REPEATS * 1e3


def check(all_reduce: Callable[[torch.Tensor], object], x: torch.Tensor, shard: Shard) -> None:
    shares = [
        torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(rank), device=x.device).bfloat16()
        for rank in range(shard.size)
    ]
    x.copy_(shares[shard.rank])
    all_reduce(x)
    expected = torch.stack(shares).double().sum(0)
    error = ((x.double() - expected).norm() / expected.norm()).item()
    if not error < 5e-3:
        raise SystemExit(f"rank {shard.rank}: {x.nbytes} bytes: relative error {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="the commit that is measured; git is asked by default")
    arguments = parser.parse_args()
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    dist.init_process_group("nccl")
    shard = Shard(dist.get_rank(), dist.get_world_size())
    communicator = Communicator(shard)
    peers = connect_peers(communicator, int(os.environ["LOCAL_WORLD_SIZE"]), SIZES[-1] // 2 // WIDTH, WIDTH, device)
    rows: dict[str, dict[str, Any]] = {}
    for num_bytes in SIZES:
        shape = (max(1, num_bytes // 2 // WIDTH), min(num_bytes // 2, WIDTH))
        x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        ways: dict[str, tuple[Callable[[torch.Tensor], object], torch.Tensor]] = {"nccl": (dist.all_reduce, x)}
        chosen = "nccl"
        if peers is not None:
            if shape[1] == WIDTH:
                x = peers.hidden[: shape[0]]
            ways |= {name: (way, x) for name, way in peers.algorithms.items() if way.takes(x)}
            chosen = peers.choose(x) or chosen
        row = rows[str(num_bytes)] = {}
        for name, (way, buffer) in ways.items():
            check(way, buffer, shard)
            row[f"{name}_us"] = round(microseconds(functools.partial(way, buffer.zero_())), 2)
        row["chosen"] = chosen
        if shard.rank == 0:
            print(f"{num_bytes:>10} bytes: {row}", flush=True)
    if shard.rank == 0 and arguments.out:
        report = header("all-reduce of bfloat16, in CUDA graphs", arguments.commit)
        report |= {"device": torch.cuda.get_device_name(), "num_ranks": shard.size, "by_message_bytes": rows}
        write_json(arguments.out, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
