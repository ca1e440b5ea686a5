"""Kernels over peer memory, such as NVLink reaches: an all-reduce of small messages in one shot, and a barrier.

For the all-reduce each rank writes its share into an inbox of every other's and adds up what it finds in its own, in
the order of the ranks, so that all get the same bits. A word of 8 bytes holds three bfloat16 and the number of the
call, so that values and the news of their arrival are one store (the idea of NCCL's LL protocol).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from worker_service.kernels.gdc import wait_for_predecessor
from worker_service.kernels.launcher import Kernel, supports_pdl
from worker_service.shard import Shard

BLOCK = 512
"""Words that are sent, and waited for, together."""
VALUES_PER_WORD = 3
VALUES_PER_BLOCK = VALUES_PER_WORD * BLOCK
MAX_PROGRAMS = 512
"""Of a call: few enough to run at once, as they wait for the other ranks'."""


@triton.jit
def _bits(x, places, mask):
    return tl.load(x + places, mask=mask, other=0.0).to(tl.uint16, bitcast=True).to(tl.int64)


@triton.jit
def _value(words, place: tl.constexpr):
    """One of the three bfloat16 of words, as float32."""
    return (words >> (16 * place)).to(tl.uint16).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def _address(place):
    """A pointer to int64 that is stored at place."""
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _one_shot(
    x, inboxes, calls, num_octets,
    RANK: tl.constexpr, SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An inbox is (2, SIZE, NUM_BLOCKS, BLOCK) int64: a block's calls take turns, so that a rank writes over nothing
    that another has yet to read, as it has had that one's next message since.
    """
    lanes = tl.arange(0, BLOCK)
    num_values = 8 * num_octets
    num_blocks = tl.cdiv(num_values, 3 * BLOCK)
    wait_for_predecessor(PDL)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        call = tl.load(calls + block) + 1
        places = block * 3 * BLOCK + lanes
        words = _bits(x, places, places < num_values)
        words |= _bits(x, places + BLOCK, places + BLOCK < num_values) << 16
        words |= _bits(x, places + 2 * BLOCK, places + 2 * BLOCK < num_values) << 32
        words |= call.to(tl.int64) << 48
        sent = (((call & 1) * SIZE + RANK) * NUM_BLOCKS + block).to(tl.int64) * BLOCK + lanes
        for step in tl.static_range(1, SIZE):
            inbox = _address(inboxes + (RANK + step) % SIZE)
            tl.store(inbox + sent, words, cache_modifier=".wt")
    inbox = _address(inboxes + RANK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        call = tl.load(calls + block) + 1
        places = block * 3 * BLOCK + lanes
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        third = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(SIZE):
            if peer == RANK:
                first += tl.load(x + places, mask=places < num_values, other=0.0).to(tl.float32)
                second += tl.load(x + places + BLOCK, mask=places + BLOCK < num_values, other=0.0).to(tl.float32)
                third += tl.load(x + places + 2 * BLOCK, mask=places + 2 * BLOCK < num_values, other=0.0).to(tl.float32)
            else:
                received = inbox + (((call & 1) * SIZE + peer) * NUM_BLOCKS + block).to(tl.int64) * BLOCK + lanes
                words = tl.load(received, volatile=True)
                while tl.max((((words >> 48) ^ call) & 0xFFFF).to(tl.int32), axis=0) != 0:
                    words = tl.load(received, volatile=True)
                first += _value(words, 0)
                second += _value(words, 1)
                third += _value(words, 2)
        dtype = x.dtype.element_ty
        tl.store(x + places, first.to(dtype), mask=places < num_values)
        tl.store(x + places + BLOCK, second.to(dtype), mask=places + BLOCK < num_values)
        tl.store(x + places + 2 * BLOCK, third.to(dtype), mask=places + 2 * BLOCK < num_values)
        tl.store(calls + block, call)


@triton.jit
def _wait_for_all(flags, calls, RANK: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):
    """Tells the other ranks that this one has come so far, and waits for their word."""
    call = tl.load(calls) + 1
    for step in tl.static_range(1, SIZE):
        tl.store(_address(flags + (RANK + step) % SIZE) + RANK, call, cache_modifier=".wt")
    ranks = tl.arange(0, SIZE_PAD)
    place = _address(flags + RANK) + ranks
    is_other = (ranks < SIZE) & (ranks != RANK)
    # Another may be on its next call already.
    reached = tl.load(place, mask=is_other, other=call, volatile=True)
    while tl.min(reached, axis=0) < call:
        reached = tl.load(place, mask=is_other, other=call, volatile=True)
    tl.store(calls, call)


_one_shot_kernel = Kernel(_one_shot)
_barrier_kernel = Kernel(_wait_for_all)


class OneShotAllReduce:
    """A rank's end. All ranks make the same calls in the same order, one after the other."""

    def __init__(self, shard: Shard, inboxes: Sequence[torch.Tensor], max_bytes: int) -> None:
        """inboxes: each rank's, as this rank reaches it, (inbox_words,) int64, zero before the first call of any.
        max_bytes: of a message.
        """
        self._shard, self.max_bytes, self._inboxes = shard, max_bytes, inboxes
        self._addresses = _addresses(inboxes)
        self._calls = torch.zeros(_num_blocks(max_bytes // 2), dtype=torch.int32, device=inboxes[0].device)

    def takes(self, x: torch.Tensor) -> bool:
        is_aligned = x.is_contiguous() and x.data_ptr() % 16 == 0 and x.nbytes % 16 == 0
        return is_aligned and x.dtype == torch.bfloat16 and x.nbytes <= self.max_bytes

    def __call__(self, x: torch.Tensor) -> None:
        """Sums x, which takes(x), over the ranks, in place; added in float32, rounded once."""
        _one_shot_kernel(
            (min(_num_blocks(x.numel()), MAX_PROGRAMS), 1, 1), x, self._addresses, self._calls, x.numel() // 8,
            RANK=self._shard.rank, SIZE=self._shard.size, NUM_BLOCKS=len(self._calls), BLOCK=BLOCK,
            PDL=supports_pdl(x.device),
        )  # fmt: skip


class Barrier:
    """A rank's end of a barrier on the GPUs' streams; the same rules."""

    def __init__(self, shard: Shard, flags: Sequence[torch.Tensor]) -> None:
        """flags: each rank's, as this rank reaches it, (ranks,) int64, zero before the first call of any."""
        self._shard, self._flags, self._addresses = shard, flags, _addresses(flags)
        self._calls = torch.zeros(1, dtype=torch.int64, device=flags[0].device)

    def __call__(self) -> None:
        size = self._shard.size
        _barrier_kernel(
            (1, 1, 1), self._addresses, self._calls,
            RANK=self._shard.rank, SIZE=size, SIZE_PAD=triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip


def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)


def inbox_words(num_ranks: int, max_bytes: int) -> int:
    """Of 8 bytes."""
    return 2 * num_ranks * _num_blocks(max_bytes // 2) * BLOCK


def _num_blocks(num_values: int) -> int:
    return triton.cdiv(num_values, VALUES_PER_BLOCK)
