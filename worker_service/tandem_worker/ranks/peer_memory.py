"""All-reduces between GPUs of one host that reach each other's memory, as over NVLink.

Small tensors are summed by a kernel (kernels/all_reduce.py), in one shot or in two. Large ones are moved by the GPUs'
copy engines, which takes no processor from the matrix products beside it, and far less power than NCCL's kernels.
"""

import itertools
import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from tandem_worker.kernels.all_reduce import Barrier, InboxAllReduce, inbox_words
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard

logger = logging.getLogger(__name__)

KERNEL_BYTES = 8 << 20
"""The largest tensors for which the kernels beat copies and NCCL, measured for two ranks (docs/performance.md)."""


def max_one_shot_bytes(num_ranks: int) -> int:
    """The largest tensors that are summed in one shot; larger ones take two. Two ranks send as much in either way, so
    one shot is faster. For more ranks this is where benchmarks/scaling_model.py has the two equal: it is not measured.
    """
    return KERNEL_BYTES if num_ranks == 2 else 256 << 10 if num_ranks <= 4 else 64 << 10


class CopyAllReduce:
    """Sums rows of a buffer that every rank has. Each rank adds up its share of the rows, then fetches the others'."""

    def __init__(self, shard: Shard, buffers: Sequence[torch.Tensor], barrier: Barrier) -> None:
        """buffers: every rank's buffer, (rows, width), as this rank reaches it."""
        self._shard, self._buffers, self._barrier = shard, buffers, barrier
        self._own = buffers[shard.rank]
        num_rows, width = self._own.shape
        self._received = self._own.new_empty(shard.size - 1, -(-num_rows // shard.size), width)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x are rows of this rank's buffer."""
        first = x.data_ptr() - self._own.data_ptr()
        return x.is_contiguous() and x.dim() == 2 and first >= 0 and first + x.nbytes <= self._own.nbytes

    def __call__(self, x: torch.Tensor) -> None:
        """Sums x in place: rows of this rank's buffer, the same rows on every rank."""
        rank, size = self._shard.rank, self._shard.size
        first = (x.data_ptr() - self._own.data_ptr()) // (self._own.stride(0) * x.itemsize)
        shares = x.tensor_split(size)
        starts = list(itertools.accumulate(map(len, shares), initial=first))
        others = [(rank + step) % size for step in range(1, size)]
        own_share = shares[rank]
        self._barrier()
        for received, other in zip(self._received, others, strict=True):
            received[: len(own_share)].copy_(self._buffers[other][starts[rank] : starts[rank] + len(own_share)])
        for received in self._received:
            own_share.add_(received[: len(own_share)])
        self._barrier()
        for other in others:
            shares[other].copy_(self._buffers[other][starts[other] : starts[other] + len(shares[other])])
        # No rank may overwrite its rows before all ranks have fetched them.
        self._barrier()


class PeerAllReduce:
    """Sums each tensor by the algorithm that suits it best. See communicator.PeerAllReduce."""

    def __init__(self, algorithms: dict[str, InboxAllReduce | CopyAllReduce], hidden: torch.Tensor) -> None:
        """algorithms: from the fastest on, by name, "copies" among them. hidden is the buffer that "copies" sums."""
        self.algorithms, self.hidden = algorithms, hidden

    def choose(self, x: torch.Tensor) -> str | None:
        """The name of the first algorithm that can sum x, or None."""
        return next((name for name, algorithm in self.algorithms.items() if algorithm.takes(x)), None)

    def sum(self, x: torch.Tensor) -> bool:
        name = self.choose(x)
        if name is not None:
            self.algorithms[name](x)
        return name is not None

    def sum_beside(self, x: torch.Tensor) -> bool:
        copies = self.algorithms["copies"]
        is_taken = copies.takes(x)
        if is_taken:
            copies(x)
        return is_taken


def connect_peers(
    communicator: Communicator, num_ranks_here: int, max_tokens: int, hidden_size: int, device: torch.device
) -> PeerAllReduce | None:
    """Sets up the sums over peer memory; all ranks call it. None where the group is spread over hosts, or one of its
    GPUs does not reach another's memory.

    The result's `hidden` is (max_tokens, hidden_size) bfloat16.
    """
    shard = communicator.shard
    own_device = torch.cuda.current_device()
    is_possible = num_ranks_here == shard.size <= torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(own_device, other) for other in range(shard.size) if other != own_device
    )
    if not communicator.smallest(int(is_possible), device):
        here = f"LOCAL_WORLD_SIZE says {num_ranks_here} of {shard.size} ranks are here"
        logger.warning("NCCL alone: the GPUs don't reach each other's memory, or are not on one host (%s)", here)
        return None
    # Multicast is not needed, and setting it up can fail where plain peer memory works.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

    def share(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """A tensor of zeros on every rank, as this rank reaches each of them."""
        own = symmetric_memory.empty(shape, dtype=dtype, device=device).zero_()
        handle = symmetric_memory.rendezvous(own, dist.group.WORLD)  # type: ignore[arg-type]
        return [own if rank == shard.rank else handle.get_buffer(rank, shape, dtype) for rank in range(shard.size)]

    def connect(max_bytes: int, *, in_two_shots: bool) -> InboxAllReduce:
        inboxes = share(inbox_words(shard.size, max_bytes, in_two_shots=in_two_shots), dtype=torch.int64)
        return InboxAllReduce(shard, inboxes, max_bytes, in_two_shots=in_two_shots)

    one_shot_bytes = max_one_shot_bytes(shard.size)
    algorithms: dict[str, InboxAllReduce | CopyAllReduce] = {"one_shot": connect(one_shot_bytes, in_two_shots=False)}
    if one_shot_bytes < KERNEL_BYTES:
        algorithms["two_shots"] = connect(KERNEL_BYTES, in_two_shots=True)
    flags = share(shard.size, dtype=torch.int64)
    hidden = share(max_tokens, hidden_size, dtype=torch.bfloat16)
    # No rank may write before all ranks have zeroed their memory.
    communicator.smallest(0, device)
    algorithms["copies"] = CopyAllReduce(shard, hidden, Barrier(shard, flags))
    return PeerAllReduce(algorithms, hidden[shard.rank])
