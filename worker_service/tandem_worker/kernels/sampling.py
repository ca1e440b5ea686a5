"""Sampling from a step's logits without sorting them: the launches, for each kind of rows, and their scratch space.

best_tokens.py has the kernels of greedy rows and rows with a temperature, top_k.py and threshold.py those of rows that
keep only some tokens. All draw what runners/sampler.py draws.
"""

from collections.abc import Callable

import torch
import triton

from tandem_worker.kernels.best_tokens import CHUNK, GROUP, BatchTensors, best_of_chunks_kernel, take_best_kernel
from tandem_worker.kernels.launcher import supports_pdl
from tandem_worker.kernels.order_keys import KEY_BITS
from tandem_worker.kernels.radix_search import DIGIT_BITS, DIGITS, PART, STATE, TRY, search_kernel
from tandem_worker.kernels.threshold import (
    best_of_kept_kernel,
    count_equal_kernel,
    propose_kernel,
    settle_kernel,
    weigh_kernel,
)
from tandem_worker.kernels.top_k import MAX_TOP_K, take_top_k_kernel
from tandem_worker.ranks.shard import Shard

MOST_PASSES = 2 * 32 // DIGIT_BITS.value
"""Passes of both searches over float32"""


class SamplingKernels:
    """Launches the kernels; owns their scratch space.

    The methods sample a token for each of the slots of `indices`, (slots,) int32, which are places among the sampling
    rows, negative for padding. The logits, bfloat16 or adjusted float32, are (slots, n) where is_compact, and
    (sampling rows, n) elsewhere; n is the vocabulary's size, or the shard's share of it.
    """

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
        self._pdl = supports_pdl(device)
        # Every rank has the same number of chunks.
        self._num_chunks = triton.cdiv(shard.vocab_share(vocab_size), CHUNK)
        self._chunk_stride = triton.cdiv(self._num_chunks, 4) * 4
        self._num_groups = triton.cdiv(vocab_size, GROUP)

        def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(max_rows * width, dtype=dtype, device=device)

        self._best = empty(3 * self._chunk_stride, torch.float32)
        if shard.size > 1:
            return
        self._group_max = empty(self._num_groups, torch.float32)
        self._group_list = empty(2 * MAX_TOP_K, torch.int32)
        self._kept_values = empty(MAX_TOP_K, torch.float32)
        self._kept_tokens = empty(MAX_TOP_K, torch.int32)
        self._tries = empty(TRY.value, torch.int32)
        self._sums = empty(MOST_PASSES * 2 * DIGITS.value, torch.int64)
        self._states = empty(MOST_PASSES * STATE.value, torch.int64)
        self._equal_counts = empty(self._chunk_stride, torch.int32)

    def sample_plain(
        self, logits: torch.Tensor, indices: torch.Tensor, batch: BatchTensors, *, is_compact: bool = False
    ) -> None:
        """Greedy, or with a temperature; nothing else is looked at."""
        best = self._best_of_chunks(logits, indices, batch, is_compact, with_groups=False)
        self._take_best(best, indices, batch)

    def sample_top_k(
        self, logits: torch.Tensor, indices: torch.Tensor, batch: BatchTensors, *, is_compact: bool = False
    ) -> None:
        """Rows with a top_k are cut to it, to MAX_TOP_K at most, and to their top_p and min_p."""
        best = self._best_of_chunks(logits, indices, batch, is_compact, with_groups=True)
        options = batch.options
        take_top_k_kernel(
            (len(indices), 1, 1), logits, indices, batch.rows, batch.context_lens, options["temperature"],
            options["top_k"], options["top_p"], options["min_p"], options["seed"], options["choice_index"],
            best, self._group_max, self._group_list, self._kept_values, self._kept_tokens, batch.last_tokens,
            batch.out, logits.stride(0), self._num_chunks, self._chunk_stride, len(indices) * self._chunk_stride,
            self._num_groups,
            VOCAB=self._part.stop, CHUNKS=triton.next_power_of_2(self._chunk_stride),
            GROUPS=triton.next_power_of_2(self._num_groups), GROUP=GROUP, MAX_K=MAX_TOP_K,
            BITS=KEY_BITS[logits.dtype], COMPACT=is_compact, PDL=self._pdl, num_warps=8,
        )  # fmt: skip

    def sample_threshold(
        self, logits: torch.Tensor, indices: torch.Tensor, batch: BatchTensors, *, is_compact: bool = False
    ) -> None:
        """All rows have a temperature, and are cut to their top_k, of any size, top_p and min_p."""
        best = self._best_of_chunks(logits, indices, batch, is_compact, with_groups=False)
        options, rows, stride, num_slots = batch.options, batch.rows, logits.stride(0), len(indices)
        temperature, top_k, top_p, min_p = (options[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        chunks, section = triton.next_power_of_2(self._chunk_stride), num_slots * self._chunk_stride
        bits, vocab = KEY_BITS[logits.dtype], self._part.stop
        last = {"BITS": bits, "COMPACT": is_compact, "PDL": self._pdl}
        propose_kernel(
            (num_slots, 1, 1), logits, indices, rows, temperature, best, self._tries, self._sums, stride,
            self._num_chunks, self._chunk_stride, section, CHUNKS=chunks, **last, num_warps=1,
        )  # fmt: skip
        parts = (triton.cdiv(vocab, PART), num_slots, 1)
        weigh_kernel(
            parts, logits, indices, rows, temperature, self._tries, self._sums, stride,
            VOCAB=vocab, PART=PART, **last, num_warps=8,
        )  # fmt: skip
        settle_kernel(
            (num_slots, 1, 1), indices, rows, temperature, top_k, top_p, min_p, self._tries, self._sums,
            BITS=bits, PDL=self._pdl, num_warps=1,
        )  # fmt: skip
        searched = (self._tries, self._sums, self._states)
        num_passes = bits // DIGIT_BITS.value
        for number in range(2 * num_passes):
            search_kernel(
                parts, logits, indices, rows, temperature, top_k, top_p, *searched, number, stride,
                VOCAB=vocab, PART=PART, BITS=bits, BY_MASS=number >= num_passes, COMPACT=is_compact, PDL=self._pdl,
                num_warps=8,
            )  # fmt: skip
        grid = (self._num_chunks, num_slots, 1)
        count_equal_kernel(
            grid, logits, indices, rows, temperature, top_k, top_p, best, *searched, self._equal_counts, stride,
            self._chunk_stride, VOCAB=vocab, CHUNK=CHUNK, **last,
        )  # fmt: skip
        best_of_kept_kernel(
            grid, logits, indices, rows, batch.context_lens, temperature, top_k, top_p, min_p, options["seed"],
            options["choice_index"], best, *searched, self._equal_counts, stride, self._chunk_stride, section,
            VOCAB=vocab, CHUNK=CHUNK, CHUNKS=chunks, **last,
        )  # fmt: skip
        self._take_best(best, indices, batch)

    def _best_of_chunks(
        self, logits: torch.Tensor, indices: torch.Tensor, batch: BatchTensors, is_compact: bool, *, with_groups: bool
    ) -> torch.Tensor:
        section = len(indices) * self._chunk_stride
        best = self._best[: 3 * section]
        options = batch.options
        # Plain sampling never reads the groups, and a shard's scratch has none.
        group_max = self._group_max if with_groups else self._best
        best_of_chunks_kernel(
            (self._num_chunks, len(indices), 1), logits, indices, batch.rows, batch.context_lens,
            options["temperature"], options["seed"], options["choice_index"], best, group_max,
            logits.stride(0), self._part.start, self._chunk_stride, section, self._num_groups,
            VOCAB=self._part.stop - self._part.start, CHUNK=CHUNK, GROUP=GROUP, WITH_GROUPS=with_groups,
            COMPACT=is_compact, PDL=self._pdl,
        )  # fmt: skip
        return best

    def _take_best(self, best: torch.Tensor, indices: torch.Tensor, batch: BatchTensors) -> None:
        gathered = self._all_gather(best)
        take_best_kernel(
            (len(indices), 1, 1), indices, batch.rows, batch.options["temperature"], gathered, batch.last_tokens,
            batch.out, self._num_chunks, self._chunk_stride, len(indices) * self._chunk_stride, len(gathered),
            CHUNKS=triton.next_power_of_2(len(gathered) * self._chunk_stride), PDL=self._pdl, num_warps=1,
        )  # fmt: skip
