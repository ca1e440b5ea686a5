"""Log-probabilities of the model's own distribution: of a given token, with its rank, of the likeliest tokens, and of
tokens that a row asks for. Two kernels: one reads the logits, and the other a row's chunks and few of its logits.
"""

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.best_tokens import CHUNK, GROUP, row_of_slot
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl
from tandem_worker.kernels.order_keys import KEY_BITS
from tandem_worker.kernels.top_k import keep_largest

MOST_TOP = 32
"""Room for likeliest tokens, and for tokens that a row asks for"""


@triton.jit
def _scan_chunks(
    logits, indices, rows, token_ids, chunks, group_max, stride, chunk_stride, section, num_groups,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each chunk's largest logit, its sum of exponentials relative to it, and how many logits are larger than that of
    the row's token: the three sections of `chunks`, (slots, chunk_stride) float32 each.
    """
    slot = tl.program_id(1)
    chunk = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        line = slot.to(tl.int64) if COMPACT else index
        logits += line * stride
        token = tl.minimum(tl.maximum(tl.load(token_ids + index), 0), VOCAB - 1)
        own = tl.load(logits + token).to(tl.float32)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        values = tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        largest = tl.max(values, axis=0)
        # Of -inf alone the sum is 0.
        total = tl.sum(tl.exp(values - tl.where(largest == float("-inf"), 0.0, largest)), axis=0)
        num_larger = tl.sum((values > own).to(tl.int32), axis=0)
        groups = tl.max(tl.reshape(values, [CHUNK // GROUP, GROUP]), axis=1)
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        tl.store(group_max + slot.to(tl.int64) * num_groups + group, groups, mask=group < num_groups)
        place = chunks + slot * chunk_stride + chunk
        tl.store(place, largest)
        tl.store(place + section, total)
        tl.store(place + 2 * section, num_larger.to(tl.float32))


@triton.jit
def _report(
    logits, indices, rows, token_ids, requested, chunks, group_max, group_list, kept_values, kept_tokens, out,
    stride, num_chunks, chunk_stride, section, num_groups, num_requested, width,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MAX_K: tl.constexpr,
    NUM_TOP: tl.constexpr, BITS: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program writes one slot's line of `out`."""
    slot = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        line = slot.to(tl.int64) if COMPACT else index
        logits += line * stride
        out += slot.to(tl.int64) * width
        lanes = tl.arange(0, CHUNKS)
        in_row = lanes < num_chunks
        place = chunks + slot * chunk_stride + lanes
        largest = tl.load(place, mask=in_row, other=float("-inf"))
        totals = tl.load(place + section, mask=in_row, other=0.0)
        num_larger = tl.sum(tl.load(place + 2 * section, mask=in_row, other=0.0), axis=0)
        top = tl.max(largest, axis=0)
        normaliser = top + tl.log(tl.sum(totals * tl.exp(largest - top), axis=0))
        token = tl.minimum(tl.maximum(tl.load(token_ids + index), 0), VOCAB - 1)
        own = tl.load(logits + token).to(tl.float32) - normaliser
        tl.store(out, num_larger.to(tl.int32) + 1)
        tl.store(out + 1 + NUM_TOP, own.to(tl.int32, bitcast=True))
        keep_largest(
            logits, group_max + slot.to(tl.int64) * num_groups, group_list + slot * 2 * MAX_K,
            kept_values + slot * MAX_K, kept_tokens + slot * MAX_K, NUM_TOP, num_groups,
            VOCAB, GROUPS, GROUP, MAX_K, BITS,
        )  # fmt: skip
        kept = tl.arange(0, MAX_K)
        is_kept = kept < NUM_TOP
        value = tl.load(kept_values + slot * MAX_K + kept, mask=is_kept, other=float("-inf"))
        token_id = tl.load(kept_tokens + slot * MAX_K + kept, mask=is_kept, other=0)
        across = tl.reshape(value, [1, MAX_K])
        is_before = (across > value[:, None]) | ((across == value[:, None]) & (kept[None, :] < kept[:, None]))
        order = tl.sum(is_before.to(tl.int32), axis=1)
        tl.store(out + 1 + order, token_id, mask=is_kept)
        tl.store(out + 2 + NUM_TOP + order, (value - normaliser).to(tl.int32, bitcast=True), mask=is_kept)
        asked = tl.arange(0, MAX_K)
        is_asked = asked < num_requested
        its_id = tl.load(requested + row.to(tl.int64) * num_requested + asked, mask=is_asked, other=0)
        its_logit = tl.load(logits + its_id, mask=is_asked, other=0.0).to(tl.float32) - normaliser
        tl.store(out + 2 + 2 * NUM_TOP + asked, its_logit.to(tl.int32, bitcast=True), mask=is_asked)


_scan_chunks_kernel = Kernel(_scan_chunks)
_report_kernel = Kernel(_report)


class LogprobKernels:
    """Launches the kernels; owns their scratch space and the reports."""

    def __init__(self, max_slots: int, vocab_size: int, num_top: int, num_requested: int, device: torch.device) -> None:
        """num_top likeliest tokens are reported of every slot, and num_requested that its row asks for."""
        assert max(num_top, num_requested) <= MOST_TOP
        self.num_top, self._num_requested = min(num_top, vocab_size), num_requested
        self._vocab_size = vocab_size
        self._num_chunks = triton.cdiv(vocab_size, CHUNK)
        self._chunk_stride = triton.cdiv(self._num_chunks, 4) * 4
        self._num_groups = triton.cdiv(vocab_size, GROUP)
        self._pdl = supports_pdl(device)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_slots * width, dtype=dtype, device=device)

        self._chunks = empty(3 * self._chunk_stride, torch.float32)
        self._group_max = empty(self._num_groups, torch.float32)
        self._group_list = empty(2 * MOST_TOP, torch.int32)
        self._kept_values = empty(MOST_TOP, torch.float32)
        self._kept_tokens = empty(MOST_TOP, torch.int32)
        width = 2 + 2 * self.num_top + num_requested
        self.out = torch.zeros(max_slots, width, dtype=torch.int32, device=device)
        """A slot's line: the rank of its token; the ids of the likeliest tokens, likeliest first; then, as bits of
        float32, the log-probability of the token, those of the likeliest ones, and those of the requested ones.
        """

    def __call__(
        self, logits: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor,
        requested: torch.Tensor, *, is_compact: bool,
    ) -> None:  # fmt: skip
        """Reports the slots of `indices`, (slots,) int32, negative for padding, in the first lines of `out`.

        rows (n,) int32 has the row in the batch of each index, negative for padding too, and token_ids (n,) int32 the
        token that is reported. logits bfloat16 are (slots, vocab_size) where is_compact, else (n, vocab_size).
        requested (all rows, num_requested) int32.
        """
        num_slots = len(indices)
        sizes = (self._chunk_stride, num_slots * self._chunk_stride, self._num_groups)
        grid = (self._num_chunks, num_slots, 1)
        _scan_chunks_kernel(
            grid, logits, indices, rows, token_ids, self._chunks, self._group_max, logits.stride(0), *sizes,
            VOCAB=self._vocab_size, CHUNK=CHUNK, GROUP=GROUP, COMPACT=is_compact, PDL=self._pdl,
        )  # fmt: skip
        _report_kernel(
            (num_slots, 1, 1), logits, indices, rows, token_ids, requested, self._chunks, self._group_max,
            self._group_list, self._kept_values, self._kept_tokens, self.out,
            logits.stride(0), self._num_chunks, *sizes, self._num_requested, self.out.shape[1],
            VOCAB=self._vocab_size, CHUNKS=triton.next_power_of_2(self._chunk_stride),
            GROUPS=triton.next_power_of_2(self._num_groups), GROUP=GROUP, MAX_K=MOST_TOP, NUM_TOP=self.num_top,
            BITS=KEY_BITS[logits.dtype], COMPACT=is_compact, PDL=self._pdl, num_warps=8,
        )  # fmt: skip
