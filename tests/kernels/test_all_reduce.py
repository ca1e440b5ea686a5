"""All-reduces between processes that share memory: the kernels' protocols, through Triton's interpreter."""

import itertools

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tandem_worker.kernels import all_reduce as all_reduce_module
from tandem_worker.kernels.all_reduce import VALUES_PER_BLOCK, Barrier, InboxAllReduce, inbox_words
from tandem_worker.ranks.peer_memory import CopyAllReduce
from tandem_worker.ranks.shard import Shard
from tests.kernels.comparison import slow_in_interpreter

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's; tests/gpu has the compiled kernels"
)

MAX_BYTES = 12 * VALUES_PER_BLOCK
LENGTHS = (64, 6 * VALUES_PER_BLOCK, 1000, 8, 6 * VALUES_PER_BLOCK, 2 * VALUES_PER_BLOCK + 24, 64)


def share(call: int, rank: int) -> torch.Tensor:
    """Small whole numbers, whose sums are exact: the interpreter rounds bfloat16 otherwise than a GPU."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return torch.randint(-40, 40, (LENGTHS[call % len(LENGTHS)],), generator=generator).bfloat16()


def call_all(
    rank: int, size: int, inboxes: dict[bool, list[torch.Tensor]], results: dict[bool, list[list[torch.Tensor]]]
) -> None:
    # Fewer than there are blocks.
    all_reduce_module.MAX_PROGRAMS = 4
    for in_two_shots in (False, True):
        all_reduce = InboxAllReduce(Shard(rank, size), inboxes[in_two_shots], MAX_BYTES, in_two_shots=in_two_shots)
        # Its last 16 bits, which are in the messages, start again soon.
        all_reduce._calls.fill_((1 << 16) - 6)
        for call, result in enumerate(results[in_two_shots][rank]):
            x = share(call, rank)
            assert all_reduce.takes(x)
            all_reduce(x)
            result.copy_(x)


@pytest.mark.parametrize("size", [slow_in_interpreter(2), 3, slow_in_interpreter(4)])
def test_sums_over_ranks_call_after_call(size: int) -> None:
    """In one shot, then in two. Both in the same processes, which take long to start."""
    num_calls = 2 * len(LENGTHS)
    inboxes, results = {}, {}
    for in_two_shots in (False, True):
        num_words = inbox_words(size, MAX_BYTES, in_two_shots=in_two_shots)
        inboxes[in_two_shots] = [torch.zeros(num_words, dtype=torch.int64).share_memory_() for _ in range(size)]
        results[in_two_shots] = [
            [torch.zeros_like(share(call, 0)).share_memory_() for call in range(num_calls)] for _ in range(size)
        ]
    multiprocessing.spawn(call_all, (size, inboxes, results), nprocs=size)
    for call in range(num_calls):
        expected = torch.stack([share(call, rank) for rank in range(size)]).sum(0)
        for in_two_shots, rank in itertools.product((False, True), range(size)):
            assert torch.equal(results[in_two_shots][rank][call], expected), (in_two_shots, call, rank)


def test_takes_what_it_was_made_for() -> None:
    inboxes = [torch.zeros(2, dtype=torch.int64)] * 2
    all_reduce = InboxAllReduce(Shard(0, 2), inboxes, MAX_BYTES, in_two_shots=False)
    assert all_reduce.takes(torch.zeros(MAX_BYTES // 2, dtype=torch.bfloat16))
    assert not all_reduce.takes(torch.zeros(MAX_BYTES // 2 + 1, dtype=torch.bfloat16))
    assert not all_reduce.takes(torch.zeros(8, dtype=torch.float32))
    assert not all_reduce.takes(torch.zeros(4, 4, dtype=torch.bfloat16).t())


def copy_all(
    rank: int, size: int, buffers: list[torch.Tensor], flags: list[torch.Tensor], parts: list[tuple[int, int]]
) -> None:
    """Sums some rows after the other; those of each call are written anew, as a forward pass does."""
    all_reduce = CopyAllReduce(Shard(rank, size), buffers, Barrier(Shard(rank, size), flags))
    for number, (first, last) in enumerate(parts):
        x = buffers[rank][first:last]
        x.copy_(rows_of(number, rank, last - first))
        assert all_reduce.takes(x)
        all_reduce(x)
        expected = torch.stack([rows_of(number, other, last - first) for other in range(size)]).sum(0)
        assert torch.equal(x, expected), (rank, number)


def rows_of(number: int, rank: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randint(-40, 40, (num_rows, 8), generator=generator).bfloat16()


@pytest.mark.parametrize("size", [slow_in_interpreter(2), 3])
def test_copies_sum_rows_of_a_shared_buffer(size: int) -> None:
    buffers = [torch.zeros(20, 8, dtype=torch.bfloat16).share_memory_() for _ in range(size)]
    flags = [torch.zeros(size, dtype=torch.int64).share_memory_() for _ in range(size)]
    parts = [(0, 20), (0, 7), (7, 20), (3, 4), (0, 20)] * 3
    multiprocessing.spawn(copy_all, (size, buffers, flags, parts), nprocs=size)


def test_copies_take_rows_of_their_buffer_alone() -> None:
    buffers = [torch.zeros(20, 8, dtype=torch.bfloat16) for _ in range(2)]
    copies = CopyAllReduce(Shard(0, 2), buffers, Barrier(Shard(0, 2), [torch.zeros(2, dtype=torch.int64)] * 2))
    assert copies.takes(buffers[0][5:])
    assert not copies.takes(buffers[0][:, :4])
    assert not copies.takes(buffers[1])
