"""Sampling with a top-k up to MAX_TOP_K, and top-p and min-p beside it: the last kernel, which takes one of the tokens
that are kept. best_tokens.py has the kernel before it.
"""

import triton
import triton.language as tl

from tandem_worker.kernels.best_tokens import FORBIDDEN, best_token, inverse_of, row_of_slot, store_token
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.gumbel import gumbel, noise_key, pair_bits
from tandem_worker.kernels.launcher import Kernel
from tandem_worker.kernels.order_keys import absent_key, kth_largest, order_key

MAX_TOP_K = 64


@triton.jit
def keep_largest(
    logits, group_max, group_list, kept_values, kept_tokens, k, num_groups,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MAX_K: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores a row's k largest logits and their tokens, by ascending id; of equal ones the lowest ids are kept.

    The pointers are to the row's own part of each array: group_max (groups,) has the largest logit of each GROUP of
    ids, group_list (2 * MAX_K,) is scratch. BITS tell the logits apart, so as many halvings find the k-th largest.
    """
    # Groups that can hold one of the k largest: fewer than k have a larger maximum than the k-th's, and of those that
    # equal it the first k suffice, as ties go to the lowest ids.
    group = tl.arange(0, GROUPS)
    in_row = group < num_groups
    keys = order_key(tl.load(group_max + group, mask=in_row, other=float("-inf")), BITS)
    keys = tl.where(in_row, keys, absent_key(BITS))
    bound = kth_largest(keys, tl.minimum(k, num_groups), BITS)
    is_equal = (keys == bound) & in_row
    matters = (keys > bound) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= k))
    LISTED: tl.constexpr = 2 * MAX_K
    place = tl.cumsum(matters.to(tl.int32), axis=0) - 1
    tl.store(group_list + place, group, mask=matters)
    num_listed = tl.sum(matters.to(tl.int32), axis=0)
    tl.debug_barrier()
    listed = tl.arange(0, LISTED)
    is_listed = listed < num_listed
    its_group = tl.load(group_list + listed, mask=is_listed, other=0)
    # The logits of the listed groups, with ascending ids.
    token_ids = its_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_candidate = is_listed[:, None] & (token_ids < VOCAB)
    values = tl.load(logits + token_ids, mask=is_candidate, other=float("-inf")).to(tl.float32)
    token_ids = tl.reshape(token_ids, [LISTED * GROUP])
    values = tl.reshape(values, [LISTED * GROUP])
    is_candidate = tl.reshape(is_candidate, [LISTED * GROUP])
    keys = tl.where(is_candidate, order_key(values, BITS), absent_key(BITS))
    bound = kth_largest(keys, k, BITS)
    is_above = keys > bound
    num_above = tl.sum(is_above.to(tl.int32), axis=0)
    is_equal = (keys == bound) & is_candidate
    is_kept = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= k - num_above))
    place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    tl.store(kept_values + place, values, mask=is_kept)
    tl.store(kept_tokens + place, token_ids, mask=is_kept)
    tl.debug_barrier()


@triton.jit
def _take_top_k(
    logits, indices, rows, context_lens, temperature, top_k, top_p, min_p, seed, choice_index,
    best, group_max, group_list, kept_values, kept_tokens, last_tokens, out,
    stride, num_chunks, chunk_stride, section, num_groups,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MAX_K: tl.constexpr,
    BITS: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program samples one row. A row without a top-k gets the best of its chunks' tokens."""
    slot = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        row_temperature = tl.load(temperature + row)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        token, top, fault = best_token(best, slot, row_temperature, num_chunks, chunk_stride, section, 1, CHUNKS)
        if (row_temperature > 0) & (k > 0) & (fault == 0):
            k = tl.minimum(k, VOCAB)
            line = slot.to(tl.int64) if COMPACT else index
            keep_largest(
                logits + line * stride, group_max + slot.to(tl.int64) * num_groups, group_list + slot * 2 * MAX_K,
                kept_values + slot * MAX_K, kept_tokens + slot * MAX_K, k, num_groups,
                VOCAB, GROUPS, GROUP, MAX_K, BITS,
            )  # fmt: skip
            # The tokens that are kept are few enough to compare each with each.
            kept = tl.arange(0, MAX_K)
            is_kept = kept < k
            value = tl.load(kept_values + slot * MAX_K + kept, mask=is_kept, other=float("-inf"))
            token_id = tl.load(kept_tokens + slot * MAX_K + kept, mask=is_kept, other=0)
            is_kept = is_kept & (value > FORBIDDEN)
            scaled = (value - top) * inverse_of(row_temperature)
            weight = tl.where(is_kept, tl.exp(scaled), 0.0)
            probability = weight / tl.sum(weight, axis=0)
            across = tl.reshape(value, [1, MAX_K])
            is_before = (across > value[:, None]) | ((across == value[:, None]) & (kept[None, :] < kept[:, None]))
            before = tl.sum(tl.where(is_before, tl.reshape(probability, [1, MAX_K]), 0.0), axis=1)
            survives = is_kept & (before < tl.where(p >= 1.0, 2.0, p))
            survives = survives & (probability >= tl.load(min_p + row) * tl.max(probability, axis=0))
            survives = survives | (is_kept & (tl.sum(is_before.to(tl.int32), axis=1) == 0))
            key = noise_key(
                tl.load(seed + row), tl.load(choice_index + row).to(tl.int64), tl.load(context_lens + row).to(tl.int64)
            )
            bits = pair_bits(key, token_id // 2)
            bits = tl.where(token_id % 2 == 0, bits >> 32, bits & 0xFFFFFFFF).to(tl.uint32)
            scores = tl.where(survives, scaled + gumbel(bits, PDL), float("-inf"))
            token = tl.sum(tl.where(kept == tl.argmax(scores, axis=0, tie_break_left=True), token_id, 0), axis=0)
        store_token(last_tokens, out, row, index, token, fault)


take_top_k_kernel = Kernel(_take_top_k)
