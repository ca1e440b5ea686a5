"""Sampling from bf16 logits in one read of them: greedy and temperature; top-k up to MAX_TOP_K with top-p and min-p.

The same draws as runners/sampler.py, whose noise these compute in float32: the argmax of logits plus Gumbel
noise, a function of (seed, choice index, position, token id).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from tandem_worker.kernels.gdc import wait_for_predecessor
from tandem_worker.kernels.launcher import Kernel, supports_pdl
from tandem_worker.ranks.shard import Shard

CHUNK = 2048
"""Logits that a program reads"""
GROUP = 64
"""Logits in a group. To find the k largest logits, top-k first compares the groups' largest ones."""
MAX_TOP_K = 64
MAX_FLOAT32 = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _mix(x):
    """SplitMix64's finaliser, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _noise_key(seed, choice_index, position):
    GAMMA: tl.constexpr = 0x9E3779B97F4A7C15
    key = _mix(seed.to(tl.uint64, bitcast=True) + GAMMA)
    key = _mix(key + choice_index.to(tl.uint64) * GAMMA + 1)
    return _mix(key + position.to(tl.uint64) * GAMMA + 2)


@triton.jit
def _pair_bits(key, pair):
    """The 64 bits of token ids 2 * pair and 2 * pair + 1."""
    GAMMA: tl.constexpr = 0x9E3779B97F4A7C15
    return _mix(key + (pair + 1).to(tl.uint64) * GAMMA)


@triton.jit
def _log(x, FAST: tl.constexpr):
    if FAST:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def _gumbel(bits, FAST: tl.constexpr):
    """-log(-log(u)) of u = 1 - v, for 32 random bits; computed from v, so that the large values are exact."""
    v = (bits ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # Near 1 the sum rounds up to it; a number below keeps the logarithm finite.
    v = tl.minimum(v, 0.99999994)
    small = v * (1.0 + v * (0.5 + v * (0.33333333 + v * 0.25)))
    return -_log(tl.where(v < 0.00390625, small, -_log(1.0 - v, FAST)), FAST)


@triton.jit
def _best_of_chunks(
    logits, rows, context_lens, temperature, seed, choice_index, best, group_max,
    stride, first_token, chunk_stride, section, num_groups,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, TRUNCATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each chunk's largest logit, and its best token with that token's score relative to it: the three sections of
    `best`, (rows, chunk_stride) each. first_token, which is even, is the id that the first logit is for.
    """
    index = tl.program_id(1)
    chunk = tl.program_id(0)
    row = tl.load(rows + index)
    wait_for_predecessor(PDL)
    if row >= 0:
        # Even and odd ids lie side by side, as each pair shares its random bits.
        pair = tl.arange(0, CHUNK // 2)
        token_ids = chunk * CHUNK + 2 * pair[:, None] + tl.arange(0, 2)[None, :]
        in_vocab = token_ids < VOCAB
        values = tl.load(logits + index.to(tl.int64) * stride + token_ids, mask=in_vocab, other=float("-inf"))
        values = values.to(tl.float32)
        largest = tl.max(tl.max(values, axis=1), axis=0)
        is_bad = tl.max(tl.max((values != values).to(tl.int32), axis=1), axis=0)
        if TRUNCATED:
            groups = tl.max(tl.reshape(values, [CHUNK // GROUP, GROUP]), axis=1)
            group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
            tl.store(group_max + index.to(tl.int64) * num_groups + group, groups, mask=group < num_groups)
        row_temperature = tl.load(temperature + row)
        scores = values - largest
        if row_temperature > 0:
            key = _noise_key(
                tl.load(seed + row), tl.load(choice_index + row).to(tl.int64), tl.load(context_lens + row).to(tl.int64)
            )
            bits = _pair_bits(key, first_token // 2 + chunk * (CHUNK // 2) + pair)
            bits = tl.join((bits >> 32).to(tl.uint32), bits.to(tl.uint32))
            # The factor is finite for the smallest temperatures too, as 0 * inf would be NaN.
            scores = scores * tl.minimum(1.0 / row_temperature, MAX_FLOAT32) + _gumbel(bits, PDL)
        scores = tl.where(in_vocab, scores, float("-inf"))
        score = tl.max(tl.max(scores, axis=1), axis=0)
        # Not by argmax: Triton 3.6 reorders a reshaped tensor that is only reduced. Of equal scores the lowest id.
        token = first_token + tl.min(tl.min(tl.where(scores == score, token_ids, VOCAB), axis=1), axis=0)
        place = best + index * chunk_stride + chunk
        tl.store(place, tl.where(is_bad > 0, float("nan"), largest))
        tl.store(place + section, score)
        tl.store(place + 2 * section, token.to(tl.float32))


@triton.jit
def _best_token(best, index, temperature, num_chunks, chunk_stride, section, num_ranks, CHUNKS: tl.constexpr):
    """The best of the chunks' tokens, the row's largest logit, and whether its logits are bad."""
    lanes = tl.arange(0, CHUNKS)
    rank = lanes // chunk_stride
    chunk = lanes % chunk_stride
    in_row = (rank < num_ranks) & (chunk < num_chunks)
    places = best + rank * 3 * section + index * chunk_stride + chunk
    largest = tl.load(places, mask=in_row, other=float("-inf"))
    scores = tl.load(places + section, mask=in_row, other=float("-inf"))
    tokens = tl.load(places + 2 * section, mask=in_row, other=0.0)
    is_bad = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    top = tl.max(largest, axis=0)
    is_bad = is_bad | (top == float("inf")) | (top == float("-inf"))
    # Chunks of -inf alone have a score of NaN, and are left out.
    below = (largest - top) / tl.where(temperature > 0, temperature, 1.0)
    scores = tl.where(largest > float("-inf"), scores + below, float("-inf"))
    token = tl.sum(tl.where(lanes == tl.argmax(scores, axis=0, tie_break_left=True), tokens, 0.0), axis=0)
    return token.to(tl.int32), top, is_bad


@triton.jit
def _take_best(
    rows, temperature, best, last_tokens, out, num_chunks, chunk_stride, section, num_ranks,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = tl.load(rows + index)
    wait_for_predecessor(PDL)
    if row >= 0:
        row_temperature = tl.load(temperature + row)
        token, _, is_bad = _best_token(
            best, index, row_temperature, num_chunks, chunk_stride, section, num_ranks, CHUNKS
        )
        tl.store(last_tokens + row, tl.where(is_bad, 0, token))
        tl.store(out + index, tl.where(is_bad, -1, token))


@triton.jit
def _order_key(values):
    """int32 that sort as the float32 values do."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_largest(keys, k, STEPS: tl.constexpr):
    """The k-th largest of int16-ranged keys, by bisection; keys of what is absent are -32768."""
    low = -32768
    high = 32767
    for _ in range(STEPS):
        middle = (low + high + 1) >> 1
        enough = tl.sum((keys >= middle).to(tl.int32), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _take_truncated(
    logits, rows, context_lens, temperature, top_k, top_p, min_p, seed, choice_index,
    best, group_max, group_list, kept_values, kept_tokens, last_tokens, out,
    num_chunks, chunk_stride, section, num_groups,
    VOCAB: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, MAX_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program samples one row. 16 bits tell bfloat16 values apart, so 16 halvings find the k-th largest exactly.

    The function is long because its sections share nearly all of their values, which live in registers.
    """
    index = tl.program_id(0)
    row = tl.load(rows + index)
    wait_for_predecessor(PDL)
    if row >= 0:
        row_temperature = tl.load(temperature + row)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        token, top, is_bad = _best_token(best, index, row_temperature, num_chunks, chunk_stride, section, 1, CHUNKS)
        if (row_temperature > 0) & (k > 0) & (is_bad == 0):
            k = tl.minimum(k, VOCAB)
            # Groups that can hold one of the k largest: fewer than k have a larger maximum than the k-th's, and of
            # those that equal it the first k suffice, as ties go to the lowest ids.
            group = tl.arange(0, GROUPS)
            in_row = group < num_groups
            keys = tl.load(group_max + index.to(tl.int64) * num_groups + group, mask=in_row, other=float("-inf"))
            keys = tl.where(in_row, _order_key(keys) >> 16, -32768)
            bound = _kth_largest(keys, tl.minimum(k, num_groups), 16)
            is_equal = (keys == bound) & in_row
            matters = (keys > bound) | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= k))
            LISTED: tl.constexpr = 2 * MAX_K
            place = tl.cumsum(matters.to(tl.int32), axis=0) - 1
            groups = group_list + index * LISTED
            tl.store(groups + place, group, mask=matters)
            num_listed = tl.sum(matters.to(tl.int32), axis=0)
            tl.debug_barrier()
            listed = tl.arange(0, LISTED)
            is_listed = listed < num_listed
            its_group = tl.load(groups + listed, mask=is_listed, other=0)
            # The logits of the listed groups, with ascending ids.
            token_ids = its_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            is_candidate = is_listed[:, None] & (token_ids < VOCAB)
            values = tl.load(
                logits + index.to(tl.int64) * VOCAB + token_ids, mask=is_candidate, other=float("-inf")
            ).to(tl.float32)
            token_ids = tl.reshape(token_ids, [LISTED * GROUP])
            values = tl.reshape(values, [LISTED * GROUP])
            is_candidate = tl.reshape(is_candidate, [LISTED * GROUP])
            keys = tl.where(is_candidate, _order_key(values) >> 16, -32768)
            bound = _kth_largest(keys, k, 16)
            is_above = keys > bound
            num_above = tl.sum(is_above.to(tl.int32), axis=0)
            is_equal = (keys == bound) & is_candidate
            is_kept = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), axis=0) <= k - num_above))
            place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
            tl.store(kept_values + index * MAX_K + place, values, mask=is_kept)
            tl.store(kept_tokens + index * MAX_K + place, token_ids, mask=is_kept)
            tl.debug_barrier()
            # The tokens that are kept are few enough to compare each with each.
            kept = tl.arange(0, MAX_K)
            is_kept = kept < k
            value = tl.load(kept_values + index * MAX_K + kept, mask=is_kept, other=float("-inf"))
            token_id = tl.load(kept_tokens + index * MAX_K + kept, mask=is_kept, other=0)
            scaled = (value - top) / row_temperature
            weight = tl.where(is_kept, tl.exp(scaled), 0.0)
            probability = weight / tl.sum(weight, axis=0)
            across = tl.reshape(value, [1, MAX_K])
            is_before = (across > value[:, None]) | ((across == value[:, None]) & (kept[None, :] < kept[:, None]))
            before = tl.sum(tl.where(is_before, tl.reshape(probability, [1, MAX_K]), 0.0), axis=1)
            survives = is_kept & (before < tl.where(p >= 1.0, 2.0, p))
            survives = survives & (probability >= tl.load(min_p + row) * tl.max(probability, axis=0))
            survives = survives | (is_kept & (tl.sum(is_before.to(tl.int32), axis=1) == 0))
            key = _noise_key(
                tl.load(seed + row), tl.load(choice_index + row).to(tl.int64), tl.load(context_lens + row).to(tl.int64)
            )
            bits = _pair_bits(key, token_id // 2)
            bits = tl.where(token_id % 2 == 0, bits >> 32, bits & 0xFFFFFFFF).to(tl.uint32)
            scores = tl.where(survives, scaled + _gumbel(bits, PDL), float("-inf"))
            token = tl.sum(tl.where(kept == tl.argmax(scores, axis=0, tie_break_left=True), token_id, 0), axis=0)
        tl.store(last_tokens + row, tl.where(is_bad, 0, token))
        tl.store(out + index, tl.where(is_bad, -1, token))


_best_of_chunks_kernel = Kernel(_best_of_chunks)
_take_best_kernel = Kernel(_take_best)
_take_truncated_kernel = Kernel(_take_truncated)


class SamplingKernels:
    """Launches the kernels; owns their scratch space."""

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        shard: Shard | None = None,
        all_gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x[None],
    ) -> None:
        """With a shard, the logits are those of its part of the vocabulary, and only plain sampling is possible.
        all_gather puts what the ranks call it with together, (ranks, ...).
        """
        shard = shard or Shard()
        self._part, self._all_gather = shard.vocab_part(vocab_size), all_gather
        # Every rank has the same number of chunks.
        self._num_chunks = triton.cdiv(shard.vocab_share(vocab_size), CHUNK)
        self._chunk_stride = triton.cdiv(self._num_chunks, 4) * 4
        self._num_groups = triton.cdiv(vocab_size, GROUP)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows * width, dtype=dtype, device=device)

        self._best = empty(3 * self._chunk_stride, torch.float32)
        self._group_max = empty(self._num_groups, torch.float32)
        self._group_list = empty(2 * MAX_TOP_K, torch.int32)
        self._kept_values = empty(MAX_TOP_K, torch.float32)
        self._kept_tokens = empty(MAX_TOP_K, torch.int32)

    def __call__(
        self,
        logits: torch.Tensor, rows: torch.Tensor, context_lens: torch.Tensor, options: dict[str, torch.Tensor],
        last_tokens: torch.Tensor, out: torch.Tensor, *, is_truncated: bool,
    ) -> None:  # fmt: skip
        """Samples a token for each of `rows`, (n,) int32, of which negative ones are padding.

        logits (n, vocab_size or the shard's share) bf16. context_lens (all rows,) int32 is where the token will stand;
        options has temperature, top_p, min_p float32, top_k int32, seed and choice_index int64, each (all rows,).
        Writes each row's entry of last_tokens, (all rows,) int32, and out, (n,) int32: -1 where the logits are not
        finite. Only if is_truncated, rows with a top_k are cut, to MAX_TOP_K at most, and to their top_p and min_p.
        """
        num_rows = len(rows)
        pdl = supports_pdl(logits.device)
        section = num_rows * self._chunk_stride
        best = self._best[: 3 * section]
        noise = (options["seed"], options["choice_index"])
        _best_of_chunks_kernel(
            (self._num_chunks, num_rows, 1), logits, rows, context_lens, options["temperature"], *noise, best,
            self._group_max, logits.stride(0), self._part.start, self._chunk_stride, section, self._num_groups,
            VOCAB=self._part.stop - self._part.start, CHUNK=CHUNK, GROUP=GROUP, TRUNCATED=is_truncated, PDL=pdl,
        )  # fmt: skip
        if not is_truncated:
            gathered = self._all_gather(best)
            _take_best_kernel(
                (num_rows, 1, 1), rows, options["temperature"], gathered, last_tokens, out, self._num_chunks,
                self._chunk_stride, section, len(gathered),
                CHUNKS=triton.next_power_of_2(len(gathered) * self._chunk_stride), PDL=pdl, num_warps=1,
            )  # fmt: skip
            return
        _take_truncated_kernel(
            (num_rows, 1, 1), logits, rows, context_lens, options["temperature"], options["top_k"], options["top_p"],
            options["min_p"], *noise, best, self._group_max, self._group_list, self._kept_values, self._kept_tokens,
            last_tokens, out, self._num_chunks, self._chunk_stride, section, self._num_groups,
            VOCAB=self._part.stop, CHUNKS=triton.next_power_of_2(self._chunk_stride),
            GROUPS=triton.next_power_of_2(self._num_groups), GROUP=GROUP, MAX_K=MAX_TOP_K, PDL=pdl, num_warps=8,
        )  # fmt: skip
