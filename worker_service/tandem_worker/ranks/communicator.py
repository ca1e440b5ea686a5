"""The collectives of a tensor-parallel group: what a forward pass needs of the other ranks.

torch.distributed does the work, by NCCL on GPUs and Gloo on CPUs. Sums between GPUs that reach each other's memory are
our own (peer_memory.py). All ranks get the same bits.
"""

import functools
from typing import Protocol

import torch
import torch.distributed as dist

from tandem_worker.ranks.shard import Shard

SIDE_CTAS = 8
"""The most processors of a GPU (SMs) that NCCL takes from the work beside it."""
# torch 2.13 renamed this function, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class PeerAllReduce(Protocol):
    """Sums over ranks whose GPUs reach each other's memory."""

    hidden: torch.Tensor
    """(most tokens of a step, hidden_size): memory any of whose rows can be summed"""

    def sum(self, x: torch.Tensor) -> bool:
        """Sums x over the ranks, in place. False, with nothing done, where it can't sum this x."""

    def sum_beside(self, x: torch.Tensor) -> bool:
        """Like sum(), but leaves the GPU's processors to other work."""


class Communicator:
    """The collectives of one rank. All ranks of a group call the same ones in the same order.

    In a group of one rank they do nothing, and need no process group.
    """

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.peer_all_reduce: PeerAllReduce | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks, in place."""
        if self.shard.size > 1 and not (self.peer_all_reduce and self.peer_all_reduce.sum(x)):
            dist.all_reduce(x)
        return x

    def begin_all_reduce(self, x: torch.Tensor) -> torch.cuda.Event:
        """Starts to sum x over the ranks, in place, on GPUs, beside what the current stream does next. The stream must
        wait for the event before it touches x.
        """
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
        """A process group of its own for sums beside other work. All ranks make it at once, as they run equal steps."""
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = SIDE_CTAS
        group: dist.ProcessGroup = dist.new_group(pg_options=options)
        return group

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x, each contiguous and of the same shape: (ranks, *x.shape), in the order of the ranks."""
        if self.shard.size == 1:
            return x[None]
        out = x.new_empty(self.shard.size * len(x), *x.shape[1:])
        _all_gather(out, x)
        return out.view(self.shard.size, *x.shape)

    def agree(self, x: torch.Tensor) -> torch.Tensor:
        """Makes x on every rank that of rank 0, in place."""
        if self.shard.size > 1:
            dist.broadcast(x, src=0)
        return x

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers. Waits for all ranks."""
        if self.shard.size == 1:
            return number
        tensor = torch.tensor(number, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def digests(self, digest: str, device: torch.device) -> list[str]:
        """All ranks' digests, hexadecimal and of one length, in the order of the ranks."""
        local = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
        return [bytes(gathered.tolist()).hex() for gathered in self.all_gather(local)]
