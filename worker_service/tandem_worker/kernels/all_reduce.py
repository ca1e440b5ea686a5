"""Kernels over peer memory, such as NVLink reaches: all-reduces of small messages, and a barrier.

In a one-shot all-reduce each rank writes its values into an inbox of every other rank, and adds up what it finds in its
own inbox, in the order of the ranks, so that all get the same bits. In a two-shot all-reduce each rank adds up one part
of the message and sends the sums to the others: two trips, but less to send where there are more than two ranks. A word
of 8 bytes holds three bfloat16 values and the number of the call, so that one store brings the values and tells that
they have arrived (the idea of NCCL's LL protocol).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl
from tandem_worker.ranks.shard import Shard

BLOCK = 512
"""Words in a block: they are sent together, and waited for together."""
VALUES_PER_WORD = 3
VALUES_PER_BLOCK = VALUES_PER_WORD * BLOCK
MAX_PROGRAMS = 511
"""Programs of one call, at most. They wait for those of the other ranks, so they must be few enough to all run at once.
An odd number, so that in a two-shot all-reduce each program has blocks of its own rank to add up.
"""


@triton.jit
def _begin(num_octets, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Gives the number of values and of blocks. x may be read once it returns."""
    wait_for_predecessor(PDL)
    return 8 * num_octets, tl.cdiv(8 * num_octets, 3 * BLOCK)


@triton.jit
def _load_block(x, block, num_values, BLOCK: tl.constexpr):
    """The three values of each of a block's words. They lie BLOCK values apart in x."""
    places = block * 3 * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x + places, mask=places < num_values, other=0.0)
    second = tl.load(x + places + BLOCK, mask=places + BLOCK < num_values, other=0.0)
    third = tl.load(x + places + 2 * BLOCK, mask=places + 2 * BLOCK < num_values, other=0.0)
    return first, second, third


@triton.jit
def _store_block(x, block, num_values, first, second, third, BLOCK: tl.constexpr):
    places = block * 3 * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + places, first, mask=places < num_values)
    tl.store(x + places + BLOCK, second, mask=places + BLOCK < num_values)
    tl.store(x + places + 2 * BLOCK, third, mask=places + 2 * BLOCK < num_values)


@triton.jit
def _bits(values):
    return values.to(tl.uint16, bitcast=True).to(tl.int64)


@triton.jit
def _words(first, second, third, call):
    return _bits(first) | (_bits(second) << 16) | (_bits(third) << 32) | (call.to(tl.int64) << 48)


@triton.jit
def _value(words, place: tl.constexpr):
    """The first, second or third value of each word."""
    return (words >> (16 * place)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _address(place):
    """The pointer to int64 values that is stored at place."""
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _slot(inboxes, rank, number, BLOCK: tl.constexpr):
    """The places of one block's words in a rank's inbox."""
    return _address(inboxes + rank) + number * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _send_to_all(inboxes, number, words, RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for step in tl.static_range(1, SIZE):
        tl.store(_slot(inboxes, (RANK + step) % SIZE, number, BLOCK), words, cache_modifier=".wt")


@triton.jit
def _receive(slot, call):
    """Waits until the words in the slot are those of this call, and gives them."""
    words = tl.load(slot, volatile=True)
    while tl.max((((words >> 48) ^ call) & 0xFFFF).to(tl.int32), axis=0) != 0:
        words = tl.load(slot, volatile=True)
    return words


@triton.jit
def _add_up(
    x, block, num_values, slot, stride, call, RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of a block over the ranks, in the ranks' order. This rank's values come from x, those of the others from
    slots that lie `stride` words apart. Added in float32, rounded once.
    """
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    third = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        if peer == RANK:
            own_first, own_second, own_third = _load_block(x, block, num_values, BLOCK)
            first += own_first.to(tl.float32)
            second += own_second.to(tl.float32)
            third += own_third.to(tl.float32)
        else:
            words = _receive(slot + peer * stride, call)
            first += _value(words, 0).to(tl.float32)
            second += _value(words, 1).to(tl.float32)
            third += _value(words, 2).to(tl.float32)
    return first.to(tl.bfloat16), second.to(tl.bfloat16), third.to(tl.bfloat16)


@triton.jit
def _one_shot(
    x, inboxes, calls, num_octets,
    RANK: tl.constexpr, SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An inbox is (2, SIZE, NUM_BLOCKS, BLOCK) int64. Odd and even calls use different halves: when a rank writes over
    the words of the call before last, it has received the last call's message from every rank, so all have read them.
    """
    num_values, num_blocks = _begin(num_octets, BLOCK, PDL)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        call = tl.load(calls + block) + 1
        first, second, third = _load_block(x, block, num_values, BLOCK)
        number = ((call & 1) * SIZE + RANK) * NUM_BLOCKS + block
        _send_to_all(inboxes, number, _words(first, second, third, call), RANK, SIZE, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        call = tl.load(calls + block) + 1
        slot = _slot(inboxes, RANK, (call & 1) * SIZE * NUM_BLOCKS + block, BLOCK)
        first, second, third = _add_up(x, block, num_values, slot, NUM_BLOCKS * BLOCK, call, RANK, SIZE, BLOCK)
        _store_block(x, block, num_values, first, second, third, BLOCK)
        tl.store(calls + block, call)


@triton.jit
def _two_shot(
    x, inboxes, calls, num_octets,
    RANK: tl.constexpr, SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each block has a rank that adds it up: the others send it their values, and it sends them the sums.

    An inbox is (2, NUM_BLOCKS, BLOCK) int64, where NUM_BLOCKS is a multiple of SIZE. The first half holds the values
    that the other ranks send, for the blocks that this rank adds up; the second half holds the sums of all blocks. One
    half for each is enough: a rank sends values only after it has received the sums of the call before, for which all
    earlier values were read, and sums are sent only in answer to values.
    """
    num_values, num_blocks = _begin(num_octets, BLOCK, PDL)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        if block % SIZE != RANK:
            first, second, third = _load_block(x, block, num_values, BLOCK)
            slot = _slot(inboxes, block % SIZE, block // SIZE * SIZE + RANK, BLOCK)
            tl.store(slot, _words(first, second, third, tl.load(calls + block) + 1), cache_modifier=".wt")
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        if block % SIZE == RANK:
            call = tl.load(calls + block) + 1
            slot = _slot(inboxes, RANK, block // SIZE * SIZE, BLOCK)
            first, second, third = _add_up(x, block, num_values, slot, BLOCK, call, RANK, SIZE, BLOCK)
            _store_block(x, block, num_values, first, second, third, BLOCK)
            _send_to_all(inboxes, NUM_BLOCKS + block, _words(first, second, third, call), RANK, SIZE, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        call = tl.load(calls + block) + 1
        if block % SIZE != RANK:
            words = _receive(_slot(inboxes, RANK, NUM_BLOCKS + block, BLOCK), call)
            _store_block(x, block, num_values, _value(words, 0), _value(words, 1), _value(words, 2), BLOCK)
        tl.store(calls + block, call)


@triton.jit
def _wait_for_all(flags, calls, RANK: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):
    """Tells the other ranks that this one has reached the barrier, and waits until all have."""
    call = tl.load(calls) + 1
    for step in tl.static_range(1, SIZE):
        tl.store(_address(flags + (RANK + step) % SIZE) + RANK, call, cache_modifier=".wt")
    ranks = tl.arange(0, SIZE_PAD)
    place = _address(flags + RANK) + ranks
    is_other = (ranks < SIZE) & (ranks != RANK)
    # Another rank may have reached its next barrier already.
    reached = tl.load(place, mask=is_other, other=call, volatile=True)
    while tl.min(reached, axis=0) < call:
        reached = tl.load(place, mask=is_other, other=call, volatile=True)
    tl.store(calls, call)


_one_shot_kernel = Kernel(_one_shot)
_two_shot_kernel = Kernel(_two_shot)
_barrier_kernel = Kernel(_wait_for_all)


class InboxAllReduce:
    """One rank's all-reduce. All ranks must make the same calls in the same order, one after the other."""

    def __init__(self, shard: Shard, inboxes: Sequence[torch.Tensor], max_bytes: int, *, in_two_shots: bool) -> None:
        """inboxes: every rank's inbox, as this rank can reach it, (inbox_words,) int64, all zeros before the first call
        of any rank. max_bytes is the size of the largest message.
        """
        self._shard, self.max_bytes, self._inboxes = shard, max_bytes, inboxes
        self._addresses = _addresses(inboxes)
        self._kernel = _two_shot_kernel if in_two_shots else _one_shot_kernel
        self._calls = torch.zeros(_num_blocks(shard.size, max_bytes), dtype=torch.int32, device=inboxes[0].device)

    def takes(self, x: torch.Tensor) -> bool:
        is_aligned = x.is_contiguous() and x.data_ptr() % 16 == 0 and x.nbytes % 16 == 0
        return is_aligned and x.dtype == torch.bfloat16 and x.nbytes <= self.max_bytes

    def __call__(self, x: torch.Tensor) -> None:
        """Sums x, which takes(x), over the ranks, in place; added in float32, rounded once."""
        self._kernel(
            (min(triton.cdiv(x.numel(), VALUES_PER_BLOCK), MAX_PROGRAMS), 1, 1),
            x, self._addresses, self._calls, x.numel() // 8,
            RANK=self._shard.rank, SIZE=self._shard.size, NUM_BLOCKS=len(self._calls), BLOCK=BLOCK,
            PDL=supports_pdl(x.device),
        )  # fmt: skip


class Barrier:
    """One rank's barrier on the GPUs' streams. All ranks must make the same calls in the same order."""

    def __init__(self, shard: Shard, flags: Sequence[torch.Tensor]) -> None:
        """flags: every rank's, as this rank can reach them, (ranks,) int64, all zeros before any rank's first call."""
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


def inbox_words(num_ranks: int, max_bytes: int, *, in_two_shots: bool) -> int:
    """The size of a rank's inbox, in words of 8 bytes."""
    return (2 if in_two_shots else 2 * num_ranks) * _num_blocks(num_ranks, max_bytes) * BLOCK


def _num_blocks(num_ranks: int, max_bytes: int) -> int:
    """The number of blocks that a message can have, rounded up to a multiple of the number of ranks."""
    return triton.cdiv(max_bytes // 2, num_ranks * VALUES_PER_BLOCK) * num_ranks
