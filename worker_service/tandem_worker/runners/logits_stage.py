"""The logits stage: what rows ask to be changed about their logits before they are sampled. The reference for the GPU.

adjust() is the meaning of the fields, as a function of one row's logits and tokens. LogitsStage applies it to those of
a step's rows that ask, and keeps their tokens for it. Nothing is remembered but tokens, so a row that is preempted, or
that another worker takes over, goes on as it would have.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import SamplingLists, adjusts_logits
from tandem_shared.step_plan import Int32Array, NewRow

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class GrammarMasks:
    """What the grammars of a step's rows allow."""

    rows: Int32Array
    """(n,): the rows whose grammars are active. Everything is allowed to a row whose grammar has not started yet."""
    bits: Int32Array
    """(n, ceil(vocab_size / 32)): token t is allowed if bit t % 32 of word t // 32 is set. A failed row has no bit
    set.
    """
    fault_codes: Mapping[int, int] = field(default_factory=dict)
    """FAULT_GRAMMAR for each row whose grammar failed"""


class Grammars(Protocol):
    """The grammars of the batch's rows."""

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Takes note of rows that enter the batch, with a grammar or without, in the place of what was there."""

    def accept(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Moves the rows' grammars on by one sampled token each. The id is negative where a row could not sample."""

    def masks(self, rows: Int32Array) -> GrammarMasks:
        """The masks of those of the rows that have a grammar."""


@dataclass(frozen=True)
class RowTokens:
    """A row that asks, and its tokens so far."""

    sampling: RowSampling
    lists: SamplingLists
    prompt: Int32Array
    output: list[int]


class LogitsStage:
    """The rows that ask, by their number in the batch."""

    def __init__(self, vocab_size: int, grammars: Grammars) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._rows: dict[int, RowTokens] = {}

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Takes note of rows that enter the batch, in the place of what was there."""
        for new in new_rows:
            self._rows.pop(new.row, None)
            if adjusts_logits(new.sampling, new.lists):
                prompt, output = np.split(new.token_ids, [new.num_prompt_tokens])
                self._rows[new.row] = RowTokens(new.sampling, new.lists, prompt, output.tolist())
        self._grammars.add(new_rows)

    def adjust(self, rows: Int32Array, logits: torch.Tensor) -> tuple[torch.Tensor, Mapping[int, int]]:
        """The logits to sample from, and fault codes by row. logits (n, vocab_size) are those of `rows`, in float32 or
        wider; they stay as they are, and are given back if no row asks.
        """
        asking = [(place, row) for place, row in enumerate(rows.tolist()) if row in self._rows]
        if not asking:
            return logits, {}
        constrained = [row for _, row in asking if self._rows[row].lists.grammar is not None]
        masks = self._grammars.masks(np.array(constrained, np.int32))
        allowed = dict(zip(masks.rows.tolist(), allowed_tokens(masks.bits, self._vocab_size), strict=True))
        adjusted = logits.clone()
        for place, row in asking:
            asked = self._rows[row]
            mask = allowed[row].to(logits.device) if row in allowed else None
            adjusted[place] = adjust(logits[place], asked.sampling, asked.lists, asked.prompt, asked.output, mask)
        return adjusted, masks.fault_codes

    def accept(self, rows: Int32Array, token_ids: torch.Tensor) -> None:
        """Notes the tokens (n,) that were sampled for `rows`, negative where a row could not sample. On a GPU this
        waits for the tokens, if a row asks.
        """
        asking = [(place, row) for place, row in enumerate(rows.tolist()) if row in self._rows]
        if not asking:
            return
        sampled = token_ids.tolist()
        for place, row in asking:
            self._rows[row].output.append(max(sampled[place], 0))
        constrained = [(place, row) for place, row in asking if self._rows[row].lists.grammar is not None]
        if constrained:
            self._grammars.accept([row for _, row in constrained], [sampled[place] for place, _ in constrained])


def num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def mask_of(token_ids: Sequence[int], vocab_size: int) -> Words:
    """The mask that allows these tokens alone: a line of GrammarMasks.bits, unsigned."""
    ids = np.array(token_ids, np.uint32)
    mask = np.zeros(num_mask_words(vocab_size), np.uint32)
    np.bitwise_or.at(mask, ids // 32, np.uint32(1) << ids % 32)
    return mask


def allowed_tokens(bits: Int32Array, vocab_size: int) -> torch.Tensor:
    """Masks as GrammarMasks has them -> (n, vocab_size) bool."""
    as_bytes = np.ascontiguousarray(bits).astype("<i4", copy=False).view(np.uint8)
    return torch.from_numpy(np.unpackbits(as_bytes, axis=1, count=vocab_size, bitorder="little").view(np.bool_))


def adjust(
    logits: torch.Tensor,
    sampling: RowSampling,
    lists: SamplingLists,
    prompt: npt.ArrayLike,
    output: Sequence[int],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a row samples from: a changed copy of its logits (vocab_size,), in float32 or wider.

    prompt and output are the row's token ids so far; mask (vocab_size,) bool says what its grammar allows. The order of
    the changes is that of SamplingLists in worker.proto, and the penalties are vLLM's: repetition_penalty is that of
    Keskar et al. 2019 (arXiv:1909.05858) with negative logits multiplied, over prompt and output; the others are
    OpenAI's, over the output. Numbers are rounded to float32 first, as they have come over the wire.
    """
    logits = logits.clone()
    if lists.allowed_token_ids:
        is_allowed = torch.zeros_like(logits, dtype=torch.bool)
        is_allowed[list(lists.allowed_token_ids)] = True
        logits[~is_allowed] = -torch.inf
    if mask is not None:
        logits[~mask] = -torch.inf
    logits[_impossible_tokens(sampling, lists, output)] = -torch.inf
    for token_id, bias in lists.logit_bias:
        logits[token_id] += float(np.float32(bias))
    if sampling.repetition_penalty != 1:
        _penalise_repetition(logits, float(np.float32(sampling.repetition_penalty)), np.append(prompt, output))
    counts = Counter(output)
    ids, times = list(counts), torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
    logits[ids] -= float(np.float32(sampling.frequency_penalty)) * times
    logits[ids] -= float(np.float32(sampling.presence_penalty))
    return logits


def _impossible_tokens(sampling: RowSampling, lists: SamplingLists, output: Sequence[int]) -> list[int]:
    """The ends of bad words whose other tokens are the output's last ones, and stop tokens before min_tokens."""
    ids = [word[-1] for word in lists.bad_words if tuple(output[max(0, len(output) + 1 - len(word)) :]) == word[:-1]]
    # A complete grammar allows end-of-sequence tokens alone, so grammars heed min_tokens themselves, in their masks.
    if len(output) < sampling.min_tokens and lists.grammar is None:
        ids += lists.stop_token_ids
    return ids


def _penalise_repetition(logits: torch.Tensor, penalty: float, token_ids: np.ndarray) -> None:
    ids = torch.from_numpy(np.unique(token_ids).astype(np.int64)).to(logits.device)
    seen = logits[ids]
    penalised = torch.where(seen > 0, seen / penalty, seen * penalty)
    # A penalty near the ends of float32's range must not make a possible token impossible, or infinitely likely.
    most = torch.finfo(logits.dtype).max
    logits[ids] = torch.where(seen.isfinite(), penalised.clamp(-most, most), seen)
