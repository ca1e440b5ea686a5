"""The collectives of a tensor-parallel group: what a forward pass needs of the other ranks.

torch.distributed's default process group does the work: NCCL on GPUs, Gloo on CPUs. All ranks get the same bits.
"""

import torch
import torch.distributed as dist

from worker_service.shard import Shard


class Communicator:
    """A group of one rank has nothing to say to anybody, and needs no process group."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.shard.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, columns) of each rank -> (rows, ranks * columns), in the order of the ranks."""
        if self.shard.size == 1:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

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
        if self.shard.size == 1:
            return [digest]
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
        everyones = self.all_gather(mine[None])[0]
        return [bytes(part.tolist()).hex() for part in everyones.chunk(self.shard.size)]
