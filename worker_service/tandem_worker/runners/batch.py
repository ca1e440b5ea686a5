"""The persistent batch, on the host: what each row holds. Checks a plan whole, then applies it. Knows no torch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import fields_out_of_range
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists, problems
from tandem_shared.step_plan import PADDING_BLOCK, Int32Array, NewRow, StepPlan


@dataclass(frozen=True)
class StepWork:
    """What a step computes: one token of each decoding row, and chunks of prompts. Row numbers ascend, except in
    chunk_rows.
    """

    chunk_rows: Int32Array
    """The rows of chunks, in the order in which their KV must be stored: a chunk may read the KV that decoding rows and
    earlier chunks store.
    """
    chunk_starts: Int32Array
    chunk_counts: Int32Array
    decode_rows: Int32Array
    sampling_rows: Int32Array
    """The rows that are sampled from: decoding rows, and those whose chunk reaches their last known token"""


class Batch:
    """What each row of the batch holds. All arrays have one entry a row, which means nothing while the row is free."""

    def __init__(
        self,
        *,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        vocab_size: int,
    ) -> None:
        self.num_rows = num_rows
        self.num_pool_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = np.full((num_rows, max_blocks), PADDING_BLOCK, np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        # The tokens that were known when the row was added, how many they are, and how many are the prompt's; then how
        # many positions are computed.
        self.token_ids: list[Int32Array] = [np.empty(0, np.int32)] * num_rows
        self.num_known = np.zeros(num_rows, np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        # The positions below num_cached are in blocks shared with other rows, and never written.
        self.num_cached = np.zeros(num_rows, np.int32)
        self.is_present = np.zeros(num_rows, np.bool_)

    @property
    def is_decoding(self) -> npt.NDArray[np.bool_]:
        return self.is_present & (self.num_computed >= self.num_known)

    def reset(self) -> None:
        self.is_present[:] = False

    def slots(self, row: int, start: int, count: int) -> Int32Array:
        """The slots for the KV of positions [start, start + count); slot 0 for those that are never written."""
        positions = np.arange(start, start + count, dtype=np.int32)
        blocks = self.block_tables[row, positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        return np.where(positions < self.num_cached[row], PADDING_BLOCK * self.block_size, slots)

    def apply(self, plan: StepPlan) -> StepWork:
        """Changes the batch as the plan says, and returns the step's work. Raises InvalidPlan, with nothing changed, if
        the batch can't follow the plan.
        """
        self._check(plan)
        self.is_present[plan.removed_rows] = False
        for new in plan.added_rows:
            row = new.row
            self.is_present[row] = True
            self.token_ids[row] = new.token_ids
            self.num_known[row] = len(new.token_ids)
            self.num_prompt[row] = new.num_prompt_tokens
            self.num_computed[row] = new.num_computed_tokens
            self.num_cached[row] = new.num_cached_tokens
            self.num_blocks[row] = len(new.block_ids)
            self.block_tables[row, : len(new.block_ids)] = new.block_ids
        decode_rows = self.is_decoding.nonzero()[0].astype(np.int32)
        for row, block_id in zip(plan.appended_block_rows.tolist(), plan.appended_block_ids.tolist(), strict=True):
            self.block_tables[row, self.num_blocks[row]] = block_id
            self.num_blocks[row] += 1
        chunk_rows, chunk_counts = _in_order_of_storing(plan)
        chunk_starts = self.num_computed[chunk_rows]
        self.num_computed[chunk_rows] += chunk_counts
        self.num_computed[decode_rows] += 1
        completed = chunk_rows[self.num_computed[chunk_rows] == self.num_known[chunk_rows]]
        return StepWork(
            chunk_rows=chunk_rows,
            chunk_starts=chunk_starts,
            chunk_counts=chunk_counts,
            decode_rows=decode_rows,
            sampling_rows=np.sort(np.concatenate([decode_rows, completed])) if len(completed) else decode_rows,
        )

    def _check(self, plan: StepPlan) -> None:
        """Raises InvalidPlan if the batch can't follow the plan. In a steady step all lists are empty, and are not
        checked, because the step's launch waits for this.
        """
        added = {new.row: new for new in plan.added_rows}
        decoding, num_blocks = self.is_decoding, self.num_blocks
        if len(plan.removed_rows) or added:
            self._check_rows(plan)
            decoding[plan.removed_rows] = False
            decoding[list(added)] = False
        if len(plan.appended_block_rows) or len(plan.appended_block_ids):
            self._check_appended(plan)
            num_blocks = num_blocks.copy()
            np.add.at(num_blocks, plan.appended_block_rows, 1)
        if len(plan.chunk_rows) or len(plan.chunk_num_tokens):
            self._check_chunks(plan, added)
        num_tokens = int(decoding.sum()) + int(plan.chunk_num_tokens.sum())
        _require(num_tokens > 0, "computes nothing")
        _require(num_tokens <= self.max_num_batched_tokens, f"computes {num_tokens} tokens, more than the limit")
        capacity = np.minimum(num_blocks * self.block_size, self.max_model_len)
        full = decoding & (self.num_computed >= capacity)
        _require(not full.any(), f"decoding rows {full.nonzero()[0].tolist()} have no slot for their next token")

    def _check_rows(self, plan: StepPlan) -> None:
        removed = plan.removed_rows
        _require(_all_within(removed, 0, self.num_rows), f"removed rows {removed.tolist()} are not all rows")
        _require(len(set(removed.tolist())) == len(removed), "removes a row twice")
        _require(bool(self.is_present[removed].all()), f"removed rows {removed.tolist()} are not all present")
        present = self.is_present.copy()
        present[removed] = False
        sound_lists = NO_LISTS
        for new in plan.added_rows:
            _require(0 <= new.row < self.num_rows, f"added row {new.row} is not a row of the batch")
            _require(not present[new.row], f"added row {new.row} is taken")
            present[new.row] = True
            self._check_new_row(new, sound_lists)
            sound_lists = new.lists

    def _check_new_row(self, new: NewRow, sound_lists: SamplingLists) -> None:
        """sound_lists: lists that were found right. A request's choices, which are neighbours, have the same."""
        where = f"added row {new.row} ({new.sequence_id})"
        num_tokens, num_computed, num_cached = len(new.token_ids), new.num_computed_tokens, new.num_cached_tokens
        _require(1 <= num_tokens <= self.max_model_len, f"{where} has {num_tokens} tokens")
        _require(_all_within(new.token_ids, 0, self.vocab_size), f"{where} has a token id outside the vocabulary")
        _require(1 <= new.num_prompt_tokens <= num_tokens, f"{where} has {new.num_prompt_tokens} prompt tokens")
        _require(num_computed == min(num_cached, num_tokens - 1), f"{where} has {num_computed} computed tokens")
        _require(num_cached <= num_tokens, f"{where} has {num_cached} cached tokens")
        _require(_all_within(new.block_ids, 1, self.num_pool_blocks), f"{where} has a block outside the pool")
        num_needed = -(-num_tokens // self.block_size)
        _require(num_needed <= len(new.block_ids) <= self.block_tables.shape[1], f"{where}: block table's length")
        wrong = [f"{field.name} {getattr(new.sampling, field.name)}" for field in fields_out_of_range(new.sampling)]
        if new.lists is not sound_lists:
            wrong += problems(new.lists, self.vocab_size)
        _require(not wrong, f"{where}: {', '.join(wrong)}")

    def _check_appended(self, plan: StepPlan) -> None:
        rows, block_ids = plan.appended_block_rows, plan.appended_block_ids
        _require(len(rows) == len(block_ids), "appended blocks are not parallel")
        _require(_all_within(rows, 0, self.num_rows), "appends to a row that does not exist")
        _require(_all_within(block_ids, 1, self.num_pool_blocks), "appends a block outside the pool")
        num_blocks = self.num_blocks.copy()
        is_open = self.is_present.copy()
        is_open[plan.removed_rows] = False
        for new in plan.added_rows:
            num_blocks[new.row] = len(new.block_ids)
            is_open[new.row] = True
        _require(bool(is_open[rows].all()), "appends to a row that is not present")
        np.add.at(num_blocks, rows, 1)
        _require(bool((num_blocks[rows] <= self.block_tables.shape[1]).all()), "appends past the context")

    def _check_chunks(self, plan: StepPlan, added: dict[int, NewRow]) -> None:
        rows, counts = plan.chunk_rows, plan.chunk_num_tokens
        _require(len(rows) == len(counts), "chunks are not parallel")
        _require(_all_within(rows, 0, self.num_rows), "computes a row that does not exist")
        _require(bool((np.diff(rows) > 0).all()), "chunk rows do not ascend")
        removed = set(plan.removed_rows.tolist())
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            if row in added:
                num_left = len(added[row].token_ids) - added[row].num_computed_tokens
            else:
                _require(bool(self.is_present[row]) and row not in removed, f"chunk of row {row}, which is not present")
                num_left = int(self.num_known[row] - self.num_computed[row])
            _require(1 <= count <= num_left, f"chunk of {count} tokens of row {row}, which has {num_left} left")


def _in_order_of_storing(plan: StepPlan) -> tuple[Int32Array, Int32Array]:
    """The rows and counts of a plan's chunks: first those of rows that were there before, then those of new rows in the
    order in which they are added.
    """
    if not plan.added_rows:
        return plan.chunk_rows, plan.chunk_num_tokens
    place = {new.row: index for index, new in enumerate(plan.added_rows)}
    order = np.argsort([place.get(row, -1) for row in plan.chunk_rows.tolist()], kind="stable")
    return plan.chunk_rows[order], plan.chunk_num_tokens[order]


def _all_within(values: Int32Array, low: int, high: int) -> bool:
    """low <= every value < high."""
    return not len(values) or (int(values.min()) >= low and int(values.max()) < high)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise InvalidPlan(problem)
