"""The token with the best score of a row, in two kernels: of each chunk of the vocabulary, then of the chunks.

The same draws as runners/sampler.py. Logits are bfloat16, or float32 where the logits stage (adjust_logits.py) has
changed them. What that forbids has the logit FORBIDDEN, so that the largest logit tells a row to which nothing is
allowed from one whose own logits are all -inf.

`indices` (slots,) says which of the step's sampling rows a program computes, and is negative for padding; `rows` says
which row of the batch that is, and may be padding too. Logits lie in the order of the sampling rows, or, where COMPACT,
in that of the slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_shared.step_plan import FAULT_NAN_LOGITS, FAULT_NO_TOKEN
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.gumbel import gumbel, noise_key, pair_bits
from tandem_worker.kernels.launcher import Kernel

CHUNK = 2048
"""Logits that a program reads"""
GROUP = 64
"""Logits in a group. To find the k largest logits, the groups' largest ones are compared first."""
MAX_FLOAT32 = tl.constexpr(3.4028234663852886e38)
FORBIDDEN = tl.constexpr(-3.4028234663852886e38)
"""The logit of a forbidden token: the smallest finite float32, which no bfloat16 is. Possible tokens' logits are above
it.
"""
NAN_LOGITS = tl.constexpr(-FAULT_NAN_LOGITS)
"""What is sampled, in a token's place, for a row whose own logits hold NaN or nothing finite"""
NO_TOKEN = tl.constexpr(-FAULT_NO_TOKEN)
"""What is sampled for a row to which nothing is allowed"""


@dataclass(frozen=True)
class BatchTensors:
    """What the samplers read and write of the batch and of the step."""

    rows: torch.Tensor
    """(sampling rows,) int32: each one's row in the batch, negative for padding"""
    context_lens: torch.Tensor
    """(all rows,) int32: where the sampled token will stand"""
    options: Mapping[str, torch.Tensor]
    """Each (all rows,): temperature, top_p and min_p float32, top_k int32, seed and choice_index int64"""
    last_tokens: torch.Tensor
    """(all rows,) int32: the sampled token is written here, 0 where there is a fault"""
    out: torch.Tensor
    """(sampling rows,) int32: and here, NAN_LOGITS or NO_TOKEN where there is a fault"""


@triton.jit
def row_of_slot(indices, rows, slot):
    """The sampling row that a slot stands for, and its row in the batch, which is negative for padding."""
    index = tl.load(indices + slot)
    return index.to(tl.int64), tl.load(rows + index, mask=index >= 0, other=-1)


@triton.jit
def inverse_of(temperature):
    """1 / temperature, finite for the smallest temperatures too, as 0 * inf would be NaN."""
    return tl.minimum(1.0 / temperature, MAX_FLOAT32)


@triton.jit
def row_fault(largest):
    """The largest of a row's chunks' largest logits, and the row's fault: NAN_LOGITS, NO_TOKEN, or 0 for none."""
    top = tl.max(largest, axis=0)
    is_bad = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    is_bad = is_bad | (top == float("inf")) | (top == float("-inf"))
    return top, tl.where(is_bad, NAN_LOGITS, tl.where(top == FORBIDDEN, NO_TOKEN, 0))


@triton.jit
def chunk_maximum(values):
    """The largest of values (n, m); NaN if one of them is."""
    largest = tl.max(tl.max(values, axis=1), axis=0)
    is_bad = tl.max(tl.max((values != values).to(tl.int32), axis=1), axis=0)
    return tl.where(is_bad > 0, float("nan"), largest)


@triton.jit
def perturbed(values, largest, pair, row, context_lens, temperature, seed, choice_index, PDL: tl.constexpr):
    """The scores of values (pairs, 2), which stand for two token ids each, relative to `largest`: with noise where the
    row has a temperature.
    """
    scores = values - largest
    row_temperature = tl.load(temperature + row)
    if row_temperature > 0:
        key = noise_key(
            tl.load(seed + row), tl.load(choice_index + row).to(tl.int64), tl.load(context_lens + row).to(tl.int64)
        )
        bits = pair_bits(key, pair)
        bits = tl.join((bits >> 32).to(tl.uint32), bits.to(tl.uint32))
        scores = scores * inverse_of(row_temperature) + gumbel(bits, PDL)
    return scores


@triton.jit
def store_best(place, section, scores, token_ids, first_token, VOCAB: tl.constexpr):
    """Stores a chunk's best score and its token. Of equal scores the lowest id."""
    score = tl.max(tl.max(scores, axis=1), axis=0)
    # Not by argmax: Triton 3.6 reorders a reshaped tensor that is only reduced.
    token = first_token + tl.min(tl.min(tl.where(scores == score, token_ids, VOCAB), axis=1), axis=0)
    tl.store(place + section, score)
    tl.store(place + 2 * section, token.to(tl.float32))


@triton.jit
def _best_of_chunks(
    logits, indices, rows, context_lens, temperature, seed, choice_index, best, group_max,
    stride, first_token, chunk_stride, section, num_groups,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, WITH_GROUPS: tl.constexpr, COMPACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each chunk's largest logit, and its best token with that token's score relative to it: the three sections of
    `best`, (slots, chunk_stride) each. first_token, which is even, is the id that the first logit is for. WITH_GROUPS
    stores the groups' largest logits too, (slots, num_groups).
    """
    slot = tl.program_id(1)
    chunk = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        # Even and odd ids lie side by side, as each pair shares its random bits.
        pair = tl.arange(0, CHUNK // 2)
        token_ids = chunk * CHUNK + 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        in_vocab = token_ids < VOCAB
        line = slot.to(tl.int64) if COMPACT else index
        values = tl.load(logits + line * stride + token_ids, mask=in_vocab, other=float("-inf")).to(tl.float32)
        largest = chunk_maximum(values)
        if WITH_GROUPS:
            groups = tl.max(tl.reshape(values, [CHUNK // GROUP, GROUP]), axis=1)
            group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
            tl.store(group_max + slot.to(tl.int64) * num_groups + group, groups, mask=group < num_groups)
        place = best + slot * chunk_stride + chunk
        tl.store(place, largest)
        pairs = first_token // 2 + chunk * (CHUNK // 2) + pair
        scores = perturbed(values, largest, pairs, row, context_lens, temperature, seed, choice_index, PDL)
        scores = tl.where(in_vocab & (values > FORBIDDEN), scores, float("-inf"))
        store_best(place, section, scores, token_ids, first_token, VOCAB)


@triton.jit
def best_token(best, slot, temperature, num_chunks, chunk_stride, section, num_ranks, CHUNKS: tl.constexpr):
    """The best of the chunks' tokens, the row's largest logit, and its fault, 0 for none."""
    lanes = tl.arange(0, CHUNKS)
    rank = lanes // chunk_stride
    chunk = lanes % chunk_stride
    in_row = (rank < num_ranks) & (chunk < num_chunks)
    places = best + rank * 3 * section + slot * chunk_stride + chunk
    largest = tl.load(places, mask=in_row, other=float("-inf"))
    scores = tl.load(places + section, mask=in_row, other=float("-inf"))
    tokens = tl.load(places + 2 * section, mask=in_row, other=0.0)
    top, fault = row_fault(largest)
    below = (largest - top) / tl.where(temperature > 0, temperature, 1.0)
    scores = tl.where(largest > FORBIDDEN, scores + below, float("-inf"))
    token = tl.sum(tl.where(lanes == tl.argmax(scores, axis=0, tie_break_left=True), tokens, 0.0), axis=0)
    return token.to(tl.int32), top, fault


@triton.jit
def store_token(last_tokens, out, row, index, token, fault):
    """A row with a fault goes on with token 0, until its sequence ends."""
    tl.store(last_tokens + row, tl.where(fault < 0, 0, token))
    tl.store(out + index, tl.where(fault < 0, fault, token))


@triton.jit
def _take_best(
    indices, rows, temperature, best, last_tokens, out, num_chunks, chunk_stride, section, num_ranks,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    index, row = row_of_slot(indices, rows, slot)
    wait_for_predecessor(PDL)
    if row >= 0:
        row_temperature = tl.load(temperature + row)
        token, _, fault = best_token(best, slot, row_temperature, num_chunks, chunk_stride, section, num_ranks, CHUNKS)
        store_token(last_tokens, out, row, index, token, fault)


best_of_chunks_kernel = Kernel(_best_of_chunks)
take_best_kernel = Kernel(_take_best)
