"""What the logits stage keeps of the rows on the device: written when a row enters the batch, by its tokens and lists.

From then on the kernels (kernels/adjust_logits.py) keep it themselves, by the tokens that they sample. So a row that is
preempted and enters again, with all its tokens, goes on as it would have.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from tandem_shared.sampling_lists import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    adjusts_logits,
    has_penalty,
)
from tandem_shared.step_plan import Int32Array, NewRow
from tandem_worker.kernels import adjust_logits
from tandem_worker.kernels.adjust_logits import AdjustedRows
from tandem_worker.runners.logits_stage import mask_of, num_mask_words
from tandem_worker.runners.transfers import padded, to_device

LISTS_START, RING_START, RING = (
    constant.value for constant in (adjust_logits.LISTS_START, adjust_logits.RING_START, adjust_logits.RING)
)
MOST_LISTS = 2 * MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + MAX_BAD_WORDS * (1 + MAX_BAD_WORD_TOKENS)


class AdjustedRowsState:
    """Owns the tensors. The entries of rows that do not ask mean nothing."""

    def __init__(self, num_rows: int, vocab_size: int, part: slice, device: torch.device) -> None:
        """part: the ids of this rank's shard of the vocabulary."""
        self._part, self._vocab_size = part, vocab_size
        self._device = device

        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(num_rows, width, dtype=torch.int32, device=device)

        self.rows = AdjustedRows(
            seen=zeros(max(part.stop - part.start, 1)),
            masks=zeros(num_mask_words(vocab_size)),
            notes=zeros(LISTS_START + MOST_LISTS),
        )
        # By row, for those that have allowed_token_ids.
        self._allowed: dict[int, Int32Array] = {}

    def add(self, new_rows: Sequence[NewRow]) -> None:
        """Writes the state of rows that enter the batch. A row with a grammar may sample nothing before set_masks."""
        for new in new_rows:
            self._allowed.pop(new.row, None)
        asking = [new for new in new_rows if adjusts_logits(new.sampling, new.lists)]
        if not asking:
            return
        # A request's choices, which are neighbours, have the same lists, which may be long.
        by_lists = [list(rows) for _, rows in itertools.groupby(asking, lambda new: id(new.lists))]
        lines = [line for rows in by_lists for line in _lines(rows)]
        notes = padded(lines, max(map(len, lines)))
        rows = to_device(np.array([new.row for new in asking]), self._device)
        self.rows.notes[:, : notes.shape[1]].index_copy_(0, rows, to_device(notes, self._device))
        self._count([new for new in asking if has_penalty(new.sampling)])
        for same in by_lists:
            if allowed := same[0].lists.allowed_token_ids:
                mask = mask_of(allowed, self._vocab_size).view(np.int32)
                self._allowed |= dict.fromkeys([new.row for new in same], mask)
        masked = [new for new in asking if _has_mask(new)]
        if masked:
            nothing = np.zeros(num_mask_words(self._vocab_size), np.int32)
            bits = [nothing if new.lists.grammar else self._allowed[new.row] for new in masked]
            self._write_masks(np.array([new.row for new in masked]), np.stack(bits))

    def set_masks(self, rows: np.ndarray, bits: Int32Array) -> None:
        """What the grammars of these rows (n,) allow, from now on: bits (n, ceil(vocab_size / 32)), whose word t // 32
        has bit t % 32 set for an allowed token t. To be called before the logits stage.
        """
        for place, row in enumerate(rows.tolist()):
            if row in self._allowed:
                bits = bits.copy()
                bits[place] &= self._allowed[row]
        self._write_masks(rows, bits)

    def _write_masks(self, rows: np.ndarray, bits: Int32Array) -> None:
        places = to_device(rows.astype(np.int64), self._device)
        self.rows.masks.index_copy_(0, places, to_device(np.ascontiguousarray(bits), self._device))

    def _count(self, new_rows: Sequence[NewRow]) -> None:
        """Counts the tokens of these rows, whatever was counted in their places before."""
        if not new_rows:
            return
        seen = self.rows.seen
        places, values = [], []
        for new in new_rows:
            ids, tokens = np.unique(new.token_ids, return_inverse=True)
            counts = 2 * np.bincount(tokens[new.num_prompt_tokens :], minlength=len(ids))
            counts[tokens[: new.num_prompt_tokens]] |= 1
            is_here = (ids >= self._part.start) & (ids < self._part.stop)
            places.append(new.row * seen.shape[1] + (ids[is_here].astype(np.int64) - self._part.start))
            values.append(counts[is_here].astype(np.int32))
        rows = to_device(np.array([new.row for new in new_rows]), self._device)
        seen.index_fill_(0, rows, 0)
        seen.view(-1).index_copy_(
            0, to_device(np.concatenate(places), self._device), to_device(np.concatenate(values), self._device)
        )


def _has_mask(new: NewRow) -> bool:
    return bool(new.lists.allowed_token_ids) or new.lists.grammar is not None


def _lines(new_rows: Sequence[NewRow]) -> list[Int32Array]:
    """The lines of AdjustedRows.notes for rows that have the same lists."""
    lists = new_rows[0].lists
    ids = [token_id for token_id, _ in lists.logit_bias]
    biases = np.array([bias for _, bias in lists.logit_bias], np.float32).view(np.int32)
    # A complete grammar allows end-of-sequence tokens alone, so the masks of grammars heed min_tokens themselves.
    stops = () if lists.grammar else lists.stop_token_ids
    lengths = [len(word) for word in lists.bad_words]
    tokens = [token_id for word in lists.bad_words for token_id in word]
    parts: list[Iterable[int]] = [ids, biases, stops, np.cumsum(lengths, dtype=np.int32), tokens]
    tail = np.concatenate([np.asarray(part, np.int32) for part in parts])
    header = np.zeros(LISTS_START, np.int32)
    header[adjust_logits.NUM_BIASES.value] = len(ids)
    header[adjust_logits.NUM_STOPS.value] = len(stops)
    header[adjust_logits.NUM_BAD_WORDS.value] = len(lengths)
    header[adjust_logits.LONGEST_BAD_WORD.value] = max(lengths, default=1)
    return [np.concatenate([_header(header, new), tail]) for new in new_rows]


def _header(of_lists: Int32Array, new: NewRow) -> Int32Array:
    """What stands before the lists in a row's line. of_lists: the same without what only this row has."""
    header = of_lists.copy()
    header[adjust_logits.NUM_PROMPT.value] = new.num_prompt_tokens
    header[adjust_logits.NUM_KNOWN.value] = len(new.token_ids)
    header[adjust_logits.HAS_PENALTY.value] = has_penalty(new.sampling)
    header[adjust_logits.HAS_MASK.value] = _has_mask(new)
    last = new.token_ids[-RING:]
    header[RING_START + np.arange(len(new.token_ids) - len(last), len(new.token_ids)) % RING] = last
    return header
