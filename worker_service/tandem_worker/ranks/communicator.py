"""The collectives of a tensor-parallel group: what a forward pass needs of the other ranks.

torch.distributed's process groups do the work, NCCL on GPUs, Gloo on CPUs, but for sums between GPUs that reach each
other's memory (peer_memory.py). All ranks get the same bits.
"""

import functools
from typing import Protocol

import torch
import torch.distributed as dist

from tandem_worker.ranks.shard import Shard

SIDE_CTAS = 8
"""Processors, at most, that NCCL takes from the work beside it."""
# torch 2.13 gave it a new name, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class PeerAllReduce(Protocol):
    """Sums over the ranks, in place, where it can."""

    hidden: torch.Tensor
    """(most tokens of a step, hidden_size): memory of which it can sum any rows"""

    def sum(self, x: torch.Tensor) -> bool:
        """Whether it could."""

    def sum_beside(self, x: torch.Tensor) -> bool:
        """The same so as to leave the GPU's processors to other work."""


class Communicator:
    """A group of one rank has nothing to say to anybody, and needs no process group."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.peer_all_reduce: PeerAllReduce | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.shard.size > 1 and not (self.peer_all_reduce and self.peer_all_reduce.sum(x)):
            dist.all_reduce(x)
        return x

    def begin_all_reduce(self, x: torch.Tensor) -> torch.cuda.Event:
        """The same on GPUs, beside what the current stream does next, which must leave x alone until the event."""
        stream = self._side_stream
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if not (self.peer_all_reduce and self.peer_all_reduce.sum_beside(x)):
                dist.all_reduce(x, group=self._side_group)
            done.record()
        return done

    @functools.cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]

    @functools.cached_property
    def _side_group(self) -> dist.ProcessGroup:
        """All ranks ask for it at the same time, as they do the same steps."""
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = SIDE_CTAS
        group: dist.ProcessGroup = dist.new_group(pg_options=options)
        return group

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(...) of each rank, contiguous -> (ranks, ...), in the order of the ranks."""
        if self.shard.size == 1:
            return x[None]
        out = x.new_empty(self.shard.size * len(x), *x.shape[1:])
        _all_gather(out, x)
        return out.view(self.shard.size, *x.shape)

    def agree(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's, on all ranks; in place."""
        if self.shard.size > 1:
            dist.broadcast(x, src=0)
        return x

    def smallest(self, number: int, device: torch.device) -> int:
        if self.shard.size == 1:
            return number
        tensor = torch.tensor(number, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def digests(self, digest: str, device: torch.device) -> list[str]:
        """Every rank's hexadecimal digest, all of one length."""
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
        return [bytes(everyones.tolist()).hex() for everyones in self.all_gather(mine)]
