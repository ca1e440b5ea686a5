"""The logits stage: what rows ask to be changed about their logits before they are sampled, for the rows that ask.

The same as runners/logits_stage.py, from what lies on the device for each row (AdjustedRows): which tokens its prompt
and its output have, a bitmap of what is allowed to it, and its lists. In each step the kernels take note of the row's
last sampled token, and write the adjusted logits, as float32, beside the model's own, which stay as they are for the
log-probabilities. A forbidden token's logit becomes FORBIDDEN. Logits that are not finite stay what they are, so that
the samplers find the fault.

Both kernels see a shard of the vocabulary, with the ids from first_token on.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tandem_shared.sampling_lists import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
)
from tandem_worker.kernels.best_tokens import CHUNK, FORBIDDEN, BatchTensors, row_of_slot
from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl

LARGEST = tl.constexpr(3.3895313892515355e38)
"""No adjusted logit is further from 0 than the largest bfloat16 is, so that every possible one is above FORBIDDEN."""
MAX_BIASES, MAX_STOPS, MAX_WORDS = map(triton.next_power_of_2, (MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, MAX_BAD_WORDS))
RING = tl.constexpr(MAX_BAD_WORD_TOKENS)
"""The last tokens of a row that its line holds"""

# Where the fields of a line of notes are.
NUM_PROMPT = tl.constexpr(0)
NUM_KNOWN = tl.constexpr(1)
NUM_BIASES = tl.constexpr(2)
NUM_STOPS = tl.constexpr(3)
NUM_BAD_WORDS = tl.constexpr(4)
LONGEST_BAD_WORD = tl.constexpr(5)
HAS_PENALTY = tl.constexpr(6)
HAS_MASK = tl.constexpr(7)
RING_START = tl.constexpr(8)
LISTS_START = tl.constexpr(8 + MAX_BAD_WORD_TOKENS)


@dataclass(frozen=True)
class AdjustedRows:
    """What the stage keeps of the batch's rows, on the device."""

    seen: torch.Tensor
    """(all rows, ids of this shard) int32: 2 * a token's count in the output, plus 1 if it is in the prompt. It means
    nothing for rows without penalties.
    """
    masks: torch.Tensor
    """(all rows, ceil(vocab_size / 32)) int32: id t is allowed if bit t % 32 of word t // 32 is set"""
    notes: torch.Tensor
    """(all rows, width) int32: a line for each row. It has the numbers whose places are named above: how many tokens
    its prompt has, and how many were known when it was added; the lengths of the lists; two flags. Then come its last
    RING tokens, that of position p at p % RING; and the lists: the ids and the float32 bits of its biases, its stop
    tokens, the ends of its bad words, and their tokens, all one after the other.
    """


@triton.jit
def _penalised(values, seen, repetition, frequency, presence):
    count = seen >> 1
    values = tl.where(seen > 0, tl.where(values > 0, values / repetition, values * repetition), values)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    return values - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)


@triton.jit
def _is_finite(values):
    return (values > float("-inf")) & (values < float("inf"))


@triton.jit
def _is_masked(mask, token_ids, in_vocab):
    """Whether ids are not allowed by a row's mask."""
    word = tl.load(mask + (token_ids >> 5), mask=in_vocab, other=0)
    return ((word >> (token_ids & 31)) & 1) == 0


@triton.jit
def _adjust(
    logits, adjusted, indices, rows, context_lens, last_tokens, repetition, frequency, presence, seen, masks, notes,
    stride, adjusted_stride, first_token, seen_stride, mask_stride, notes_stride,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of a row: masks and penalties. The token that was sampled last is counted on the way."""
    index, row = row_of_slot(indices, rows, tl.program_id(1))
    row = row.to(tl.int64)
    wait_for_predecessor(PDL)
    if row >= 0:
        local = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        in_vocab = local < VOCAB
        raw = tl.load(logits + index * stride + local, mask=in_vocab, other=float("-inf")).to(tl.float32)
        values = raw
        line = notes + row * notes_stride
        if tl.load(line + HAS_PENALTY) > 0:
            place = seen + row * seen_stride + local
            counts = tl.load(place, mask=in_vocab, other=0)
            if tl.load(context_lens + row) > tl.load(line + NUM_KNOWN):
                is_last = (local + first_token == tl.load(last_tokens + row)) & in_vocab
                counts += tl.where(is_last, 2, 0)
                tl.store(place, counts, mask=is_last)
            values = _penalised(
                raw, counts, tl.load(repetition + row), tl.load(frequency + row), tl.load(presence + row)
            )
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        if tl.load(line + HAS_MASK) > 0:
            is_masked = _is_masked(masks + row * mask_stride, local + first_token, in_vocab)
            values = tl.where(is_masked, FORBIDDEN, values)
        values = tl.where(_is_finite(raw), values, raw)
        tl.store(adjusted + index * adjusted_stride + local, values, mask=in_vocab)


@triton.jit
def _forbid(logits, adjusted, token_ids, first_token, is_listed, VOCAB: tl.constexpr):
    """Forbids these ids in the row that starts at logits and adjusted."""
    local = token_ids - first_token
    is_here = is_listed & (local >= 0) & (local < VOCAB)
    raw = tl.load(logits + local, mask=is_here, other=float("inf")).to(tl.float32)
    tl.store(adjusted + local, tl.full(local.shape, FORBIDDEN, tl.float32), mask=is_here & _is_finite(raw))


@triton.jit
def _ends_of_bad_words(line, ends, num_words, num_output, context_len, MAX_WORDS: tl.constexpr):
    """The last tokens of the bad words whose other tokens are the output's last ones; -1 for other words. The row's
    bad words are at `ends`.
    """
    word = tl.arange(0, MAX_WORDS)
    is_listed = word < num_words
    tokens = ends + num_words
    end = tl.load(ends + word, mask=is_listed, other=0)
    length = end - tl.load(ends + word - 1, mask=is_listed & (word > 0), other=0)
    matches = is_listed & (length - 1 <= num_output)
    for back in range(tl.load(line + LONGEST_BAD_WORD) - 1):
        # From the last but one token of the word on, against the output from its last token on.
        is_compared = matches & (back < length - 1)
        expected = tl.load(tokens + end - 2 - back, mask=is_compared, other=0)
        position = tl.maximum(context_len - 1 - back, 0)
        token = tl.load(line + RING_START + position % RING)
        matches = matches & ((is_compared == 0) | (expected == token))
    return tl.load(tokens + end - 1, mask=matches, other=-1)


@triton.jit
def _adjust_listed(
    logits, adjusted, indices, rows, context_lens, last_tokens, repetition, frequency, presence, min_tokens,
    seen, masks, notes, stride, adjusted_stride, first_token, seen_stride, mask_stride, notes_stride,
    VOCAB: tl.constexpr, MAX_BIASES: tl.constexpr, MAX_STOPS: tl.constexpr, MAX_WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The tokens of a row's lists: biases, which come before the penalties, then stop tokens and ends of bad words. The
    token that was sampled last is written to the row's ring on the way.
    """
    index, row = row_of_slot(indices, rows, tl.program_id(0))
    row = row.to(tl.int64)
    wait_for_predecessor(PDL)
    if row >= 0:
        line = notes + row * notes_stride
        context_len = tl.load(context_lens + row)
        num_output = context_len - tl.load(line + NUM_PROMPT)
        if context_len > tl.load(line + NUM_KNOWN):
            tl.store(line + RING_START + (context_len - 1) % RING, tl.load(last_tokens + row))
        logits += index * stride
        adjusted += index * adjusted_stride
        num_biases = tl.load(line + NUM_BIASES)
        if num_biases > 0:
            number = tl.arange(0, MAX_BIASES)
            is_listed = number < num_biases
            token_ids = tl.load(line + LISTS_START + number, mask=is_listed, other=-1)
            bias = tl.load(line + LISTS_START + num_biases + number, mask=is_listed, other=0)
            local = token_ids - first_token
            is_here = is_listed & (local >= 0) & (local < VOCAB)
            raw = tl.load(logits + local, mask=is_here, other=float("-inf")).to(tl.float32)
            values = raw + bias.to(tl.float32, bitcast=True)
            if tl.load(line + HAS_PENALTY) > 0:
                counts = tl.load(seen + row * seen_stride + local, mask=is_here, other=0)
                values = _penalised(
                    values, counts, tl.load(repetition + row), tl.load(frequency + row), tl.load(presence + row)
                )
            values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
            is_possible = is_here & _is_finite(raw)
            if tl.load(line + HAS_MASK) > 0:
                is_possible = is_possible & (_is_masked(masks + row * mask_stride, token_ids, is_here) == 0)
            tl.store(adjusted + local, values, mask=is_possible)
        num_stops = tl.load(line + NUM_STOPS)
        stops = line + LISTS_START + 2 * num_biases
        num_words = tl.load(line + NUM_BAD_WORDS)
        # What is forbidden overwrites what has a bias, and the ring is read below.
        tl.debug_barrier()
        if (num_stops > 0) & (num_output < tl.load(min_tokens + row)):
            number = tl.arange(0, MAX_STOPS)
            is_listed = number < num_stops
            token_ids = tl.load(stops + number, mask=is_listed, other=-1)
            _forbid(logits, adjusted, token_ids, first_token, is_listed, VOCAB)
        if num_words > 0:
            ends = stops + num_stops
            token_ids = _ends_of_bad_words(line, ends, num_words, num_output, context_len, MAX_WORDS)
            _forbid(logits, adjusted, token_ids, first_token, token_ids >= 0, VOCAB)


_adjust_kernel = Kernel(_adjust)
_adjust_listed_kernel = Kernel(_adjust_listed)


def adjust_logits(
    logits: torch.Tensor,
    adjusted: torch.Tensor,
    indices: torch.Tensor,
    batch: BatchTensors,
    state: AdjustedRows,
    first_token: int,
    num_tokens: int,
) -> None:
    """Writes the adjusted logits of the sampling rows at `indices`, (slots,) int32, negative for padding.

    logits bfloat16 and adjusted float32 are (sampling rows, num_tokens or more), of the ids from first_token on.
    batch.options has the three penalties as float32 and min_tokens as int32. To be run once for each token of a row,
    between the forward pass and the sampler.
    """
    options = batch.options
    penalties = [options[f"{name}_penalty"] for name in ("repetition", "frequency", "presence")]
    strides = (
        logits.stride(0), adjusted.stride(0), first_token, state.seen.stride(0), state.masks.stride(0),
        state.notes.stride(0),
    )  # fmt: skip
    common = (logits, adjusted, indices, batch.rows, batch.context_lens, batch.last_tokens, *penalties)
    kept = (state.seen, state.masks, state.notes)
    pdl = supports_pdl(logits.device)
    _adjust_kernel(
        (max(triton.cdiv(num_tokens, CHUNK), 1), len(indices), 1), *common, *kept, *strides,
        VOCAB=num_tokens, CHUNK=CHUNK, PDL=pdl,
    )  # fmt: skip
    _adjust_listed_kernel(
        (len(indices), 1, 1), *common, options["min_tokens"], *kept, *strides,
        VOCAB=num_tokens, MAX_BIASES=MAX_BIASES, MAX_STOPS=MAX_STOPS, MAX_WORDS=MAX_WORDS, PDL=pdl,
    )  # fmt: skip
