"""The radix search of threshold.py: where, in falling order of logits, a row's tokens reach a count or a mass.

Each pass is one read of the logits, in which each part of the vocabulary sums up, for each of 16 digits, the tokens
whose keys begin with the digits found so far and then this one. 4 passes find a bfloat16, 8 a float32. Two searches
come one after the other: one by count, for top-k, and one by mass, for top-p, among what top-k leaves. A row that does
not ask for one of them passes over it.

Each pass reads the state that the pass before it left, a line of STATE int64, takes the next digit by the sums of the
pass before, and one program of the row stores the new state for the next pass.
"""

import triton
import triton.language as tl

from tandem_worker.kernels.best_tokens import FORBIDDEN, inverse_of, row_of_slot
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel
from tandem_worker.kernels.order_keys import order_key

PART = 8192
"""Logits that a program of a search reads"""
DIGIT_BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
STATE = tl.constexpr(8)
"""int64 of a search's state: the digits found so far; the count and the mass above them; the count or mass to reach, 0
where nothing is searched and -1 where it is a share of all mass; top-k's bound and how many tokens that equal it are
kept; two of padding.
"""
SCALE = tl.constexpr(8796093022208.0)
"""2^43 stands for the mass of the likeliest token; 2^18 tokens of it fit an int64 with room to spare."""
MANY = tl.constexpr(1 << 40)
"""More tokens than there are"""
# The int32 that a slot has in `tries`: whether its row must be searched; its largest logit, as float32; the best token,
# and its logit, as float32.
IS_OPEN = tl.constexpr(0)
TOP = tl.constexpr(1)
BEST_TOKEN = tl.constexpr(2)
BEST_LOGIT = tl.constexpr(3)
TRY = tl.constexpr(4)


@triton.jit
def read_float(place):
    return tl.load(place).to(tl.float32, bitcast=True)


@triton.jit
def sortable(values, BITS: tl.constexpr):
    """uint32 that sort as the values do."""
    return (order_key(values, 32).to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - BITS)


@triton.jit
def scaled_mass(key, top, inverse_temperature, BITS: tl.constexpr):
    """The fixed-point mass of a token whose sortable key this is; int64."""
    bits = ((key.to(tl.uint32) << (32 - BITS)) ^ 0x80000000).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if BITS == 16:
        bits = (bits >> 16) << 16
    value = bits.to(tl.float32, bitcast=True)
    return (tl.exp((value - top) * inverse_temperature) * SCALE).to(tl.int64)


@triton.jit
def sums_of(sums, slot, number, BITS: tl.constexpr):
    """Where a row's pass has its sums: DIGITS masses, then DIGITS counts."""
    PASSES: tl.constexpr = 2 * (BITS // DIGIT_BITS)
    return sums + (slot.to(tl.int64) * PASSES + number) * 2 * DIGITS


@triton.jit
def _state_before(
    states, sums, slot, row, number, top_k, top_p, top, inverse_temperature, BITS: tl.constexpr
):  # fmt: skip
    """The state before pass `number`, or after the last one: prefix, count above, mass above, target, floor, equal."""
    PASSES: tl.constexpr = BITS // DIGIT_BITS
    previous = number - 1
    has_previous = number > 0
    state = states + (slot.to(tl.int64) * 2 * PASSES + previous) * STATE
    digits = tl.arange(0, DIGITS)
    previous_sums = sums_of(sums, slot, previous, BITS)
    k = tl.load(top_k + row).to(tl.int64)
    p = tl.load(top_p + row)
    prefix = tl.load(state, mask=has_previous, other=0)
    above_count = tl.load(state + 1, mask=has_previous, other=0)
    above_mass = tl.load(state + 2, mask=has_previous, other=0)
    target = tl.load(state + 3, mask=has_previous, other=0)
    floor = tl.load(state + 4, mask=has_previous, other=0)
    num_equal = tl.load(state + 5, mask=has_previous, other=0)
    by_mass = previous >= PASSES
    is_active = has_previous & (target != 0)
    masses = tl.load(previous_sums + digits, mask=is_active & (digits >= 0), other=0)
    counts = tl.load(previous_sums + DIGITS + digits, mask=is_active & (digits >= 0), other=0)
    share = (tl.sum(masses, axis=0).to(tl.float64) * p.to(tl.float64)).to(tl.int64)
    target = tl.where(target < 0, tl.maximum(share, 1), target)
    amounts = tl.where(by_mass, masses, counts)
    from_here = tl.sum(amounts, axis=0) - tl.cumsum(amounts, axis=0) + amounts
    reaches = tl.where(by_mass, above_mass, above_count) + from_here >= target
    digit = tl.max(tl.where(reaches, digits, -1), axis=0)
    # Too few tokens for top-k: there is no bound. Too little mass, by rounding: all of these tokens are kept.
    target = tl.where(is_active & (digit < 0) & (by_mass == 0), 0, target)
    digit = tl.maximum(digit, 0)
    beyond = digits > digit
    above_count = above_count + tl.sum(tl.where(beyond, counts, 0), axis=0)
    above_mass = above_mass + tl.sum(tl.where(beyond, masses, 0), axis=0)
    prefix = tl.where(is_active, (prefix << DIGIT_BITS) + digit, prefix)
    if number == 0:
        target = k
        num_equal = num_equal + MANY
    if number == PASSES:
        # The search by count has ended.
        if target > 0:
            floor = prefix
            num_equal = target - above_count
            kept = above_mass + num_equal * scaled_mass(floor, top, inverse_temperature, BITS)
            target = tl.maximum((kept.to(tl.float64) * p.to(tl.float64)).to(tl.int64), 1)
        else:
            target = target - 1
        target = tl.where(p >= 1.0, 0, target)
        prefix = prefix * 0
        above_count = above_count * 0
        above_mass = above_mass * 0
    return prefix, above_count, above_mass, target, floor, num_equal


@triton.jit
def bound(states, sums, slot, row, top_k, top_p, top, inverse_temperature, BITS: tl.constexpr):
    """What the searches have found: the bound's sortable key, and how many tokens that equal it are kept, at most."""
    number = 2 * (BITS // DIGIT_BITS)
    prefix, _, above_mass, target, floor, num_equal = _state_before(
        states, sums, slot, row, number, top_k, top_p, top, inverse_temperature, BITS
    )
    if target > 0:
        mass = tl.maximum(scaled_mass(prefix, top, inverse_temperature, BITS), 1).to(tl.float64)
        missing = tl.ceil((target - above_mass).to(tl.float64) / mass)
        needed = tl.maximum(tl.minimum(missing, 1e12).to(tl.int64), 1)
        num_equal = tl.where(prefix == floor, tl.minimum(needed, num_equal), needed)
        floor = prefix
    return floor, num_equal


@triton.jit
def _search(
    logits, indices, rows, temperature, top_k, top_p, tries, sums, states, number, stride,
    VOCAB: tl.constexpr, PART: tl.constexpr, BITS: tl.constexpr, BY_MASS: tl.constexpr, COMPACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Pass `number`; those of the search by mass follow those of the search by count."""
    PASSES: tl.constexpr = BITS // DIGIT_BITS
    slot = tl.program_id(1)
    part = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    is_open = False
    if row >= 0:
        is_open = tl.load(tries + slot * TRY + IS_OPEN) > 0
    if is_open:
        top = read_float(tries + slot * TRY + TOP)
        inverse = inverse_of(tl.load(temperature + row))
        prefix, above_count, above_mass, target, floor, num_equal = _state_before(
            states, sums, slot, row, number, top_k, top_p, top, inverse, BITS
        )
        if part == 0:
            state = states + (slot.to(tl.int64) * 2 * PASSES + number) * STATE
            tl.store(state, prefix)
            tl.store(state + 1, above_count)
            tl.store(state + 2, above_mass)
            tl.store(state + 3, target)
            tl.store(state + 4, floor)
            tl.store(state + 5, num_equal)
        if target != 0:
            line = slot.to(tl.int64) if COMPACT else index
            token_ids = part * PART + tl.arange(0, PART)
            values = tl.load(logits + line * stride + token_ids, mask=token_ids < VOCAB, other=float("-inf"))
            values = values.to(tl.float32)
            keys = sortable(values, BITS)
            shift = (PASSES - 1 - number % PASSES) * DIGIT_BITS
            rest = keys >> shift.to(tl.uint32)
            matters = ((rest >> DIGIT_BITS) == prefix.to(tl.uint32)) & (values > FORBIDDEN)
            matters = matters & (keys >= floor.to(tl.uint32))
            digit = tl.where(matters, (rest & (DIGITS - 1)).to(tl.int32), -1)
            # Nothing is summed up for digits that no token here has.
            highest = tl.max(digit, axis=0)
            lowest = tl.min(tl.where(matters, digit, DIGITS), axis=0)
            mass = tl.exp((values - top) * inverse)
            digits = tl.arange(0, DIGITS)
            masses = tl.zeros([DIGITS], tl.float32)
            counts = tl.zeros([DIGITS], tl.int32)
            for each in range(lowest, highest + 1):
                is_here = digit == each
                masses = tl.where(digits == each, tl.sum(tl.where(is_here, mass, 0.0), axis=0), masses)
                if not BY_MASS:
                    counts = tl.where(digits == each, tl.sum(is_here.to(tl.int32), axis=0), counts)
            place = sums_of(sums, slot, number, BITS) + digits
            tl.atomic_add(place, (masses * SCALE).to(tl.int64), mask=masses > 0, sem="relaxed")
            if not BY_MASS:
                tl.atomic_add(place + DIGITS, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


search_kernel = Kernel(_search)
