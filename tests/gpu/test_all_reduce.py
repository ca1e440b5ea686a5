"""The all-reduce kernels as they are compiled, between processes that share one GPU's memory and take turns on it: any
number of ranks, whatever GPUs there are. benchmarks.all_reduce checks those that are each on a GPU.
"""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tandem_worker.kernels.all_reduce import MAX_PROGRAMS, VALUES_PER_BLOCK, InboxAllReduce, inbox_words
from tandem_worker.ranks.peer_memory import KERNEL_BYTES
from tandem_worker.ranks.shard import Shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]

MOST = KERNEL_BYTES // 2
LENGTHS = (8, 4096, 64 * 4096, MOST, 8 * 1001, MOST - 8, 256 * 4096)
NUM_REPLAYS = 3


def share(call: int, rank: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 * call + rank)
    return torch.randn(LENGTHS[call % len(LENGTHS)], generator=generator, device="cuda").bfloat16()


def total(call: int, size: int) -> torch.Tensor:
    """Added in float32 in the order of the ranks, rounded once."""
    added = share(call, 0).float()
    for rank in range(1, size):
        added += share(call, rank).float()
    return added.bfloat16()


def call_all(rank: int, size: int, in_two_shots: bool, inboxes: list[torch.Tensor]) -> None:
    all_reduce = InboxAllReduce(Shard(rank, size), inboxes, KERNEL_BYTES, in_two_shots=in_two_shots)
    for call in range(2 * len(LENGTHS)):
        x = share(call, rank)
        assert all_reduce.takes(x)
        all_reduce(x)
        assert torch.equal(x, total(call, size)), (call, rank)
    buffers = [share(call, rank) for call in range(len(LENGTHS))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffer in buffers:
            all_reduce(buffer)
    for replay in range(NUM_REPLAYS):
        calls = range(replay * len(LENGTHS), (replay + 1) * len(LENGTHS))
        for call, buffer in zip(calls, buffers, strict=True):
            buffer.copy_(share(call, rank))
        graph.replay()
        for call, buffer in zip(calls, buffers, strict=True):
            assert torch.equal(buffer, total(call, size)), (call, rank)


@pytest.mark.parametrize(("size", "in_two_shots"), [(2, False), (4, False), (3, True), (4, True), (8, True)])
def test_sums_over_ranks(size: int, in_two_shots: bool) -> None:
    assert MOST > MAX_PROGRAMS * VALUES_PER_BLOCK, "some programs must have several blocks"
    num_words = inbox_words(size, KERNEL_BYTES, in_two_shots=in_two_shots)
    inboxes = [torch.zeros(num_words, dtype=torch.int64, device="cuda") for _ in range(size)]
    torch.cuda.synchronize()
    multiprocessing.spawn(call_all, (size, in_two_shots, inboxes), nprocs=size)
