"""Paged decode attention: split-KV flash decoding (Dao et al. 2023) with grouped queries, one token a row.

It also normalises and rotates q and, in a decode step, stores the new KV, so that a decode step's attention is one
kernel. What each program computes is planned on the device, once a step, from the lengths of the contexts: a long
context among short ones is cut into more splits. The last program of a row and KV head to finish combines the splits,
in their order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl
from tandem_worker.kernels.store_kv import load_norm, normalize_and_rotate

LOG2_E = 1.4426950408889634
GROUP_PAD = 16
"""Rows of the smallest matrix product, to which the heads of a group are padded"""
MIN_SPLIT_LEN = 64
SPLIT_UNIT = 16
PROGRAMS_A_PROCESSOR = 4
FEW_ROWS = 8
"""With up to so many rows, a step's time is latency more than bandwidth."""
PREFETCH_ROWS = 4
"""With up to so many rows, a split's first tile is read before qkv is there; with more, that is no faster."""
COMBINED_A_WARP = 16
"""Partial results (splits times heads of a group) that each warp combines at a time"""


@triton.jit
def _plan_splits(
    rows, context_lens, items, num_rows, num_items, wanted,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, ITEMS: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Cuts all rows into splits of about the same length, and each row evenly, into at most num_rows + wanted items. A
    program cuts one row.
    """
    wait_for_predecessor(PDL)
    me = tl.program_id(0)
    index = tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < num_rows, other=-1)
    num_tokens = tl.load(context_lens + row, mask=row >= 0, other=0)
    target = tl.maximum(tl.cdiv(tl.sum(num_tokens, axis=0), wanted), MIN_SPLIT_LEN)
    # Unless splits are of the minimum length, a row that is a little longer than the target gets no further split.
    spare = tl.where(target > MIN_SPLIT_LEN, target * 9 // 20, target - 1)
    num_splits = tl.maximum((num_tokens + spare) // target, 1)
    split_len = tl.cdiv(tl.maximum(tl.cdiv(num_tokens, num_splits), 1), UNIT) * UNIT
    num_splits = tl.where(row >= 0, tl.maximum(tl.cdiv(num_tokens, split_len), 1), 0)
    first = tl.sum(tl.where(index < me, num_splits, 0), axis=0)
    mine = tl.sum(tl.where(index == me, num_splits, 0), axis=0)
    my_len = tl.sum(tl.where(index == me, split_len, 0), axis=0)
    split = tl.arange(0, SPLITS)
    item = items + (first + split) * 4
    is_mine = split < mine
    tl.store(item, me + tl.zeros([SPLITS], tl.int32), mask=is_mine)
    tl.store(item + 1, split, mask=is_mine)
    tl.store(item + 2, mine + tl.zeros([SPLITS], tl.int32), mask=is_mine)
    tl.store(item + 3, my_len + tl.zeros([SPLITS], tl.int32), mask=is_mine)
    if me == num_rows - 1:
        place = tl.arange(0, ITEMS)
        is_free = (place >= first + mine) & (place < num_items)
        tl.store(items + place * 4, tl.full([ITEMS], -1, tl.int32), mask=is_free)


@triton.jit
def _load_tile(
    key_cache, value_cache, table, kv_head, first, end,
    KVH: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keys, as halves of (D // 2, TILE), and values, (TILE, D), of the positions from first on; zeros past end."""
    HALF: tl.constexpr = D // 2
    tokens = first + tl.arange(0, TILE)
    in_context = tokens < end
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
    where = ((blocks * BLOCK_SIZE + tokens % BLOCK_SIZE) * KVH + kv_head) * D
    keys = key_cache + where[None, :] + tl.arange(0, HALF)[:, None]
    k1 = tl.load(keys, mask=in_context[None, :], other=0.0)
    k2 = tl.load(keys + HALF, mask=in_context[None, :], other=0.0)
    v = tl.load(value_cache + where[:, None] + tl.arange(0, D)[None, :], mask=in_context[:, None], other=0.0)
    return k1, k2, v


@triton.jit
def _attend_tile(q1, q2, k1, k2, v, num_tokens, scale, best, total, acc, TILE: tl.constexpr):
    """Adds the first num_tokens tokens of a tile to the running softmax."""
    scores = (tl.dot(q1, k1) + tl.dot(q2, k2)) * scale
    scores = tl.where(tl.arange(0, TILE)[None, :] < num_tokens, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # Where there has been no token at all yet, -inf - -inf must not be NaN.
    base = tl.where(new_best > float("-inf"), new_best, 0.0)
    correction = tl.exp2(best - base)
    weights = tl.exp2(scores - base[:, None])
    total = total * correction + tl.sum(weights, axis=1)
    acc = acc * correction[:, None] + tl.dot(weights.to(v.dtype), v)
    return new_best, total, acc


@triton.jit
def _combine(
    partials, out, first_item, num_splits, kv_head, index,
    KVH: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Combines a row's partial results to its attention, SPLITS at a time, in the order of the splits."""
    WIDTH: tl.constexpr = D + 2
    group = tl.arange(0, GROUP_PAD)
    in_group = group < GROUP
    columns = tl.arange(0, D)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D], tl.float32)
    for start in range(0, num_splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < num_splits)[:, None] & in_group[None, :]
        item = (first_item + split).to(tl.int64)
        place = partials + ((item * KVH + kv_head)[:, None] * GROUP + group[None, :]) * WIDTH
        bests = tl.load(place + D, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(place + D + 1, mask=mask, other=0.0, cache_modifier=".cg")
        accs = tl.load(
            place[:, :, None] + columns[None, None, :], mask=mask[:, :, None], other=0.0, cache_modifier=".cg"
        )
        new_best = tl.maximum(best, tl.max(bests, axis=0))
        base = tl.where(in_group, new_best, 0.0)
        correction = tl.exp2(best - base)
        weights = tl.exp2(bests - base[None, :])
        total = total * correction + tl.sum(totals * weights, axis=0)
        acc = acc * correction[:, None] + tl.sum(accs * weights[:, :, None], axis=0)
        best = new_best
    heads = (index.to(tl.int64) * KVH + kv_head) * GROUP + group[:, None]
    result = acc / tl.where(in_group, total, 1.0)[:, None]
    tl.store(out + heads * D + columns[None, :], result.to(out.dtype.element_ty), mask=in_group[:, None])


@triton.jit
def _decode_attention(
    qkv, q_norm, k_norm, rotary, key_cache, value_cache, block_tables, rows, context_lens, items, out, partials,
    counters, table_stride, eps, scale,
    H: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, STORE: tl.constexpr, PREFETCH: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """With PREFETCH, a split's first tile is read before the wait for qkv, as earlier steps have stored it. That is so
    only with STORE, that is, in a decode step.

    The function is long because its sections share nearly all of their values, which live in registers.
    """
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = H // KVH
    dtype: tl.constexpr = qkv.dtype.element_ty
    group = tl.arange(0, GROUP_PAD)[:, None]
    in_group = group < GROUP
    half = tl.arange(0, HALF)
    columns = tl.arange(0, D)
    # These may be read before the wait, as they were written two or more kernels ago.
    index = tl.load(items + item * 4)
    is_active = index >= 0
    split = tl.load(items + item * 4 + 1, mask=is_active, other=0)
    num_splits = tl.load(items + item * 4 + 2, mask=is_active, other=1)
    split_len = tl.load(items + item * 4 + 3, mask=is_active, other=0)
    row = tl.load(rows + index, mask=is_active, other=0)
    num_tokens = tl.load(context_lens + row, mask=is_active, other=1)
    # The tokens that are in the cache. If this kernel stores, the newest one is not.
    num_stored = num_tokens - 1 if STORE else num_tokens
    start = split * split_len
    end = tl.minimum(start + split_len, num_stored)
    table = block_tables + row.to(tl.int64) * table_stride
    position = num_tokens - 1
    cos = tl.load(rotary + position * D + half).to(tl.float32)[None, :]
    sin = tl.load(rotary + position * D + HALF + half).to(tl.float32)[None, :]
    norm1, norm2 = load_norm(q_norm, D, NORM)
    if PREFETCH:
        k1, k2, v = _load_tile(key_cache, value_cache, table, kv_head, start, end, KVH, D, BLOCK_SIZE, TILE)
    wait_for_predecessor(PDL)
    if is_active:
        base = qkv + index.to(tl.int64) * (H + 2 * KVH) * D
        queries = base + (kv_head * GROUP + group) * D + half[None, :]
        q1 = tl.load(queries, mask=in_group, other=0.0).to(tl.float32)
        q2 = tl.load(queries + HALF, mask=in_group, other=0.0).to(tl.float32)
        q1, q2 = normalize_and_rotate(q1, q2, norm1, norm2, cos, sin, eps, D, NORM, dtype)
        best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, D], tl.float32)
        if STORE:  # noqa: SIM102
            if split == num_splits - 1:
                keys = base + (H + kv_head) * D + half[None, :]
                norm1, norm2 = load_norm(k_norm, D, NORM)
                new_k1, new_k2 = normalize_and_rotate(
                    tl.load(keys).to(tl.float32), tl.load(keys + HALF).to(tl.float32),
                    norm1, norm2, cos, sin, eps, D, NORM, dtype,
                )  # fmt: skip
                new_v = tl.load(base + (H + KVH + kv_head) * D + columns)
                block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
                slot = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * KVH + kv_head) * D
                tl.store(key_cache + slot + half[None, :], new_k1)
                tl.store(key_cache + slot + HALF + half[None, :], new_k2)
                tl.store(value_cache + slot + columns, new_v)
                products = q1.to(tl.float32) * new_k1.to(tl.float32) + q2.to(tl.float32) * new_k2.to(tl.float32)
                best = tl.sum(products, axis=1) * scale
                total = tl.full([GROUP_PAD], 1.0, tl.float32)
                acc = tl.zeros([GROUP_PAD, D], tl.float32) + new_v.to(tl.float32)[None, :]
        first = start
        if PREFETCH:
            best, total, acc = _attend_tile(q1, q2, k1, k2, v, end - first, scale, best, total, acc, TILE)
            first += TILE
        for tile in range(first, end, TILE):
            k1, k2, v = _load_tile(key_cache, value_cache, table, kv_head, tile, end, KVH, D, BLOCK_SIZE, TILE)
            best, total, acc = _attend_tile(q1, q2, k1, k2, v, end - tile, scale, best, total, acc, TILE)
        heads = (index.to(tl.int64) * KVH + kv_head) * GROUP + group
        if num_splits == 1:
            tl.store(out + heads * D + columns[None, :], (acc / total[:, None]).to(dtype), mask=in_group)
        else:
            # A partial is acc, then best and total: D + 2 numbers.
            WIDTH: tl.constexpr = D + 2
            place = partials + ((item.to(tl.int64) * KVH + kv_head) * GROUP + group) * WIDTH
            tl.store(place + columns[None, :], acc, mask=in_group)
            tl.store(place + D, best[:, None], mask=in_group)
            tl.store(place + D + 1, total[:, None], mask=in_group)
            tl.debug_barrier()
            counter = counters + index * KVH + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
                tl.store(counter, 0)
                COMBINED: tl.constexpr = triton.next_power_of_2(GROUP)
                _combine(
                    partials, out, item - split, num_splits, kv_head, index, KVH, D, GROUP, COMBINED, SPLITS // COMBINED
                )  # fmt: skip


_plan_kernel = Kernel(_plan_splits)
_kernel = Kernel(_decode_attention)


@dataclass(frozen=True)
class DecodeRows:
    """One token of each of `rows`, and how the work on them is divided among programs."""

    rows: torch.Tensor
    """(n,) int32; negative ones are padding"""
    context_lens: torch.Tensor
    """(all rows,) int32, the new tokens included"""
    block_tables: torch.Tensor
    """(all rows, most blocks of a row) int32"""
    items: torch.Tensor
    """(items, 4) int32, an item for each split: the row's index in rows, or -1 for padding; the split's number; the
    number of the row's splits; the tokens in each of them
    """


class DecodeAttention:
    """Launches the kernels, and owns the memory of the splits' partial results."""

    def __init__(self, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self._device = device
        self._num_full = max(1, PROGRAMS_A_PROCESSOR * _num_processors(device) // num_kv_heads)
        partials = max(num_rows + self._num_wanted(num_rows) for num_rows in range(1, max_rows + 1)) * num_heads
        self._partials = torch.empty((partials, head_dim + 2), dtype=torch.float32, device=device)
        self._counters = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)

    def plan(self, rows: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor) -> DecodeRows:
        """Plans a step's attention: the same for all layers. rows must not be empty; see DecodeRows."""
        num_rows = len(rows)
        wanted = self._num_wanted(num_rows)
        num_items = num_rows + wanted
        items = torch.empty((num_items, 4), dtype=torch.int32, device=self._device)
        _plan_kernel(
            (num_rows, 1, 1), rows, context_lens, items, num_rows, num_items, wanted,
            ROWS=triton.next_power_of_2(num_rows), SPLITS=triton.next_power_of_2(wanted + 1),
            ITEMS=triton.next_power_of_2(num_items), MIN_SPLIT_LEN=MIN_SPLIT_LEN, UNIT=SPLIT_UNIT,
            PDL=supports_pdl(self._device),
        )  # fmt: skip
        return DecodeRows(rows, context_lens, block_tables, items)

    def _num_wanted(self, num_rows: int) -> int:
        """The number of splits to aim for.

        That is as many as make two rounds of the programs that the GPU can run at once; fewer for few rows, but at
        least two a row. Where the rows alone make two rounds, it is half as many again, so that rows longer than the
        mean are still cut.
        """
        if num_rows >= 1.9 * self._num_full:
            return num_rows * 3 // 2
        return num_rows * max(2, min(self._num_full + 2 * num_rows, 2 * self._num_full) // num_rows)

    def __call__(
        self,
        qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, rotary: torch.Tensor,
        cache: torch.Tensor, decode: DecodeRows, out: torch.Tensor, *, stores: bool,
    ) -> None:  # fmt: skip
        """Writes the rows' tokens, which come first, of out, (tokens, heads * head_dim); nothing for padding rows.

        qkv (tokens, heads + 2 KV heads, head_dim); q_norm and k_norm (head_dim,), or both None for no norms. If
        `stores`, the new tokens' k and v are not in the cache yet, and put there.
        """
        num_rows, (_, num_all, head_dim) = len(decode.rows), qkv.shape
        num_kv_heads = cache.shape[3]
        num_heads = num_all - 2 * num_kv_heads
        # With few rows, wide tiles keep enough loads under way; many rows fill the GPU with programs of one warp.
        has_few_rows = num_rows <= FEW_ROWS
        num_warps = 2 if has_few_rows else 1
        _kernel(
            (num_kv_heads, len(decode.items), 1),
            # A pointer that is not used must still be one.
            qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, rotary, cache[0], cache[1],
            decode.block_tables, decode.rows, decode.context_lens,
            decode.items, out, self._partials, self._counters, decode.block_tables.stride(0), eps,
            head_dim**-0.5 * LOG2_E,
            H=num_heads, KVH=num_kv_heads, D=head_dim, GROUP_PAD=max(GROUP_PAD, num_heads // num_kv_heads),
            BLOCK_SIZE=cache.shape[2], TILE=64 if has_few_rows else 32, STORE=stores,
            PREFETCH=stores and num_rows <= PREFETCH_ROWS,
            SPLITS=COMBINED_A_WARP * num_warps, NORM=q_norm is not None, PDL=supports_pdl(self._device),
            num_warps=num_warps, num_stages=2,
        )  # fmt: skip


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
