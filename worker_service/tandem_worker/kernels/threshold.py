"""Sampling with top-p (Holtzman et al. 2019) or min-p (Nguyen et al. 2024) without top-k, or with a top-k of any size:
the kernels that find what is kept, without sorting, and the one that takes each chunk's best of it.

Theory of operation. The token with the best score of all is the answer if it is among those that are kept, and with a
top-p of 0.95 it is so in 95 of 100 cases. So that is tried first: it needs one read of the logits, which sums up the
mass and the number of the tokens before it, in falling order of logits and rising order of ids. Only rows for which
that fails are searched for what is kept; for the others the rest of the kernels end at once.

In the same order, the kept tokens are the first ones. So they are all tokens whose logit is above some bound, and of
those that equal it the ones with the lowest ids. radix_search.py finds the bound. min-p is a bound on the mass itself.

The mass of a token is exp((logit - largest) / temperature). A part of the vocabulary sums masses in float32, always in
the same order; the sums of parts are added as integers of a fixed scale, whose sum does not depend on the order. So a
row's bound is the same in every batch, on every rank.
"""

import triton
import triton.language as tl

from tandem_worker.kernels.best_tokens import (
    FORBIDDEN,
    best_token,
    inverse_of,
    perturbed,
    row_of_slot,
    store_best,
)
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel
from tandem_worker.kernels.radix_search import (
    BEST_LOGIT,
    BEST_TOKEN,
    DIGIT_BITS,
    DIGITS,
    IS_OPEN,
    MANY,
    SCALE,
    TOP,
    TRY,
    bound,
    read_float,
    sortable,
    sums_of,
)


@triton.jit
def _propose(
    logits, indices, rows, temperature, best, tries, sums, stride, num_chunks, chunk_stride, section,
    CHUNKS: tl.constexpr, BITS: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best token of all, and zeros for the sums. A row with a fault is not searched."""
    slot = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        line = slot.to(tl.int64) if COMPACT else index
        token, top, fault = best_token(
            best, slot, tl.load(temperature + row), num_chunks, chunk_stride, section, 1, CHUNKS
        )
        mine = tries + slot * TRY
        tl.store(mine + IS_OPEN, (fault == 0).to(tl.int32))
        tl.store(mine + TOP, top.to(tl.int32, bitcast=True))
        tl.store(mine + BEST_TOKEN, token)
        value = tl.load(logits + line * stride + token, mask=fault == 0, other=0.0).to(tl.float32)
        tl.store(mine + BEST_LOGIT, value.to(tl.int32, bitcast=True))
        ALL: tl.constexpr = 4 * (BITS // DIGIT_BITS) * DIGITS
        tl.store(sums_of(sums, slot, 0, BITS) + tl.arange(0, ALL), tl.zeros([ALL], tl.int64))


@triton.jit
def _weigh(
    logits, indices, rows, temperature, tries, sums, stride,
    VOCAB: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The mass and the number of the tokens before the best one, and of all, in the places of the first pass's sums."""
    slot = tl.program_id(1)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        mine = tries + slot * TRY
        if tl.load(mine + IS_OPEN) > 0:
            line = slot.to(tl.int64) if COMPACT else index
            token_ids = tl.program_id(0) * PART + tl.arange(0, PART)
            values = tl.load(logits + line * stride + token_ids, mask=token_ids < VOCAB, other=float("-inf"))
            values = values.to(tl.float32)
            best_logit = read_float(mine + BEST_LOGIT)
            is_before = (values > best_logit) | ((values == best_logit) & (token_ids < tl.load(mine + BEST_TOKEN)))
            is_possible = values > FORBIDDEN
            inverse = inverse_of(tl.load(temperature + row))
            masses = tl.where(is_possible, tl.exp((values - read_float(mine + TOP)) * inverse), 0.0)
            place = sums_of(sums, slot, 0, BITS)
            mass_before = tl.sum(tl.where(is_before, masses, 0.0), axis=0)
            tl.atomic_add(place, (mass_before * SCALE).to(tl.int64), sem="relaxed")
            tl.atomic_add(place + 1, (tl.sum(masses, axis=0) * SCALE).to(tl.int64), sem="relaxed")
            tl.atomic_add(place + 2, tl.sum(is_before.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")
            tl.atomic_add(place + 3, tl.sum(is_possible.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _settle(
    indices, rows, temperature, top_k, top_p, min_p, tries, sums, BITS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Whether the best token is kept: then its row is not searched. Zeros the sums again."""
    slot = tl.program_id(0)
    _, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        mine = tries + slot * TRY
        place = sums_of(sums, slot, 0, BITS)
        mass_before = tl.load(place)
        count_before = tl.load(place + 2)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        inverse = inverse_of(tl.load(temperature + row))
        mass = tl.exp((read_float(mine + BEST_LOGIT) - read_float(mine + TOP)) * inverse)
        # Where top-k leaves some out, the mass of the others is not known yet: it is this at least.
        at_least = mass_before + (mass * SCALE).to(tl.int64)
        all_mass = tl.where((k > 0) & (k < tl.load(place + 3)), at_least, tl.load(place + 1))
        reach = tl.maximum((all_mass.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)
        is_kept = ((k == 0) | (count_before < k)) & ((p >= 1.0) | (mass_before < reach))
        is_kept = is_kept & (mass >= tl.load(min_p + row))
        tl.store(mine + IS_OPEN, tl.where(is_kept, 0, tl.load(mine + IS_OPEN)))
        # All threads have read the sums.
        tl.debug_barrier()
        tl.store(place + tl.arange(0, 4), tl.zeros([4], tl.int64))


@triton.jit
def _count_equal(
    logits, indices, rows, temperature, top_k, top_p, best, tries, sums, states, equal_counts, stride, chunk_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, COMPACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """How many of each chunk's logits equal the bound, (slots, chunk_stride)."""
    slot = tl.program_id(1)
    chunk = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    is_open = False
    if row >= 0:
        is_open = tl.load(tries + slot * TRY + IS_OPEN) > 0
    if is_open:
        top = read_float(tries + slot * TRY + TOP)
        inverse = inverse_of(tl.load(temperature + row))
        limit, num_equal = bound(states, sums, slot, row, top_k, top_p, top, inverse, BITS)
        if num_equal < MANY:
            place = slot * chunk_stride + chunk
            count = 0
            if sortable(tl.load(best + place), BITS) >= limit.to(tl.uint32):
                line = slot.to(tl.int64) if COMPACT else index
                token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
                in_vocab = token_ids < VOCAB
                values = tl.load(logits + line * stride + token_ids, mask=in_vocab, other=float("-inf"))
                is_equal = (sortable(values.to(tl.float32), BITS) == limit.to(tl.uint32)) & in_vocab
                count = tl.sum(is_equal.to(tl.int32), axis=0)
            tl.store(equal_counts + place, count)


@triton.jit
def _best_of_kept(
    logits, indices, rows, context_lens, temperature, top_k, top_p, min_p, seed, choice_index,
    best, tries, sums, states, equal_counts, stride, chunk_stride, section,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr, COMPACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Writes the two last sections of `best`, as best_of_chunks_kernel has them, by the kept tokens alone."""
    slot = tl.program_id(1)
    chunk = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    is_open = False
    if row >= 0:
        is_open = tl.load(tries + slot * TRY + IS_OPEN) > 0
    if is_open:
        top = read_float(tries + slot * TRY + TOP)
        inverse = inverse_of(tl.load(temperature + row))
        limit, num_equal = bound(states, sums, slot, row, top_k, top_p, top, inverse, BITS)
        place = best + slot * chunk_stride + chunk
        largest = tl.load(place)
        least_mass = tl.load(min_p + row)
        if (sortable(largest, BITS) < limit.to(tl.uint32)) | (tl.exp((largest - top) * inverse) < least_mass):
            # Nothing is kept in this chunk.
            tl.store(place + section, float("-inf"))
        else:
            pair = tl.arange(0, CHUNK // 2)
            token_ids = chunk * CHUNK + 2 * pair[:, None] + tl.arange(0, 2)[None, :]
            in_vocab = token_ids < VOCAB
            line = slot.to(tl.int64) if COMPACT else index
            values = tl.load(logits + line * stride + token_ids, mask=in_vocab, other=float("-inf")).to(tl.float32)
            keys = sortable(values, BITS)
            is_kept = (keys > limit.to(tl.uint32)) & (values > FORBIDDEN)
            is_equal = (keys == limit.to(tl.uint32)) & (values > FORBIDDEN)
            if num_equal < MANY:
                lanes = tl.arange(0, CHUNKS)
                counts = tl.load(equal_counts + slot * chunk_stride + lanes, mask=lanes < chunk, other=0)
                num_before = tl.sum(counts, axis=0)
                order = tl.cumsum(tl.reshape(is_equal.to(tl.int32), [CHUNK]), axis=0)
                is_equal = is_equal & (num_before + tl.reshape(order, [CHUNK // 2, 2]) <= num_equal)
            is_kept = (is_kept | is_equal) & (tl.exp((values - top) * inverse) >= least_mass)
            pairs = chunk * (CHUNK // 2) + pair
            scores = perturbed(values, largest, pairs, row, context_lens, temperature, seed, choice_index, PDL)
            store_best(place, section, tl.where(is_kept, scores, float("-inf")), token_ids, 0, VOCAB)


propose_kernel = Kernel(_propose)
weigh_kernel = Kernel(_weigh)
settle_kernel = Kernel(_settle)
count_equal_kernel = Kernel(_count_equal)
best_of_kept_kernel = Kernel(_best_of_kept)
