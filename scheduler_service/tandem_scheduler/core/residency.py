"""The scheduler's picture of one worker: which sequence holds which row and blocks, and what the prefix cache holds.

Moves sequences in and out; knows nothing of who should move when.
"""

from dataclasses import replace

import numpy as np

from tandem_scheduler.core.block_manager import BlockManager, CachedBlock
from tandem_scheduler.core.rows import Rows
from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import Int32Array, NewRow, WorkerInfo


class Residency:
    """The rows and blocks of a worker that starts empty."""

    def __init__(self, worker: WorkerInfo, num_rows: int, *, enable_prefix_caching: bool) -> None:
        self.worker = worker
        self.rows = Rows(num_rows)
        self.blocks = BlockManager(worker.num_blocks, worker.block_size)
        self._enable_prefix_caching = enable_prefix_caching
        # Rows that were given back since the last plan. The next plan removes them.
        self.removed_rows: list[int] = []
        # Sequences in rows whose known tokens are not all scheduled yet, in order of entry.
        self.prefilling: list[Sequence] = []
        # Decoding sequences with a full block of known ids whose last slot no plan writes yet: it can't be shared yet.
        self._awaiting_registration: list[Sequence] = []

    def why_never_fits(self, sequence: Sequence) -> str | None:
        limit, size = self.worker.max_model_len, self.blocks.block_size
        if sequence.max_len > limit:
            return (
                f"{sequence.num_prompt_tokens} prompt tokens and {sequence.request.max_tokens} output tokens "
                f"are more than the context of {limit}"
            )
        # The last token is never stored.
        num_blocks = -(-(sequence.max_len - 1) // size)
        if num_blocks > self.blocks.num_total:
            return f"needs {num_blocks} blocks of {size} tokens; the KV pool has {self.blocks.num_total}"
        return None

    def try_enter(self, sequence: Sequence, watermark: float) -> NewRow | None:
        """Gives a waiting sequence a row and blocks for all its tokens, or returns None if there are not enough.

        watermark is the share of all blocks that must stay available, unless no other sequence has a row.
        """
        blocks = self.blocks
        num_tokens = len(sequence.token_ids)
        hits: list[CachedBlock] = []
        # The log-probabilities of cached tokens are not known, so they are computed again if they were asked for.
        if self._enable_prefix_caching and not sequence.lacks_prompt_logprobs:
            salt = sequence.request.cache_salt
            blocks.extend_keys(sequence.block_keys, sequence.token_ids, salt)
            hits = blocks.match(sequence.block_keys, sequence.token_ids, salt)
        num_new = -(-num_tokens // blocks.block_size) - len(hits)
        reserve = int(blocks.num_total * watermark) if self.rows.num_used else 0
        if self.rows.num_free == 0 or num_new + reserve > blocks.num_available - blocks.num_evictable_among(hits):
            return None
        # The hits come first, so that a new block can't evict them.
        block_table = blocks.acquire(hits)
        block_table += blocks.allocate(num_new)
        num_cached = len(hits) * blocks.block_size
        # A full hit still computes its last token, for its logits; the worker doesn't store it again.
        num_computed = min(num_cached, num_tokens - 1)
        row = self.rows.take(sequence)
        sequence.enter_row(row, block_table, num_computed)
        sequence.num_registered_blocks = len(hits)
        sequence.parent_block = hits[-1] if hits else None
        self.prefilling.append(sequence)
        sampling = sequence.request.sampling
        if sampling.num_prompt_logprobs is not None and not sequence.reports_prompt:
            sampling = replace(sampling, num_prompt_logprobs=None)
        return NewRow(
            row=row,
            sequence_id=sequence.sequence_id,
            token_ids=np.array(sequence.token_ids, np.int32),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_computed_tokens=num_computed,
            num_cached_tokens=num_cached,
            block_ids=np.array(block_table, np.int32),
            sampling=sampling,
            lists=sequence.request.lists,
        )

    def grow(self, sequence: Sequence) -> int:
        """Gives a decoding row one more block. The caller has made sure that there is one."""
        block_ids = self.blocks.allocate(1)
        sequence.block_table += block_ids
        self.rows.capacity[sequence.row] += self.blocks.block_size
        return block_ids[0]

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        """Notes that the plan under construction computes a chunk. Its full blocks may be shared from now on: in each
        layer, a new row reads after the rows that are older, or were added before it, have stored.
        """
        sequence.num_computed_tokens += num_tokens
        self._register_blocks(sequence, sequence.num_computed_tokens)

    def advance(self, decoding: Int32Array) -> None:
        """Notes that the plan under construction computes one token of each decoding row."""
        self.rows.next_position[decoding] += 1
        for sequence in self._awaiting_registration:
            if sequence.row >= 0 and self.rows.is_decoding[sequence.row]:
                self._register_blocks(sequence, int(self.rows.next_position[sequence.row]))
        self._awaiting_registration.clear()

    def start_decoding(self, sequence: Sequence) -> None:
        self.prefilling.remove(sequence)
        self.rows.start_decoding(sequence, self.blocks.block_size)

    def note_confirmed(self, sequence: Sequence) -> None:
        """Notes that a decoding row's newest token is known, so that all ids of a block may be known now."""
        num_tokens = len(sequence.token_ids)
        if num_tokens % self.blocks.block_size == 0:
            if self.rows.next_position[sequence.row] >= num_tokens:
                self._register_blocks(sequence, num_tokens)
            else:
                self._awaiting_registration.append(sequence)

    def vacate(self, sequence: Sequence) -> None:
        """Frees a sequence's row and blocks. This is the only place that does. Plans run in order, so a block that is
        freed while step N is planned may be written by step N, whatever is in flight.
        """
        if not self.rows.is_decoding[sequence.row]:
            self.prefilling.remove(sequence)
        self.blocks.release(sequence.block_table)
        self.removed_rows.append(sequence.row)
        self.rows.give_back(sequence.row)
        sequence.leave_row()

    def distrust(self, sequence: Sequence) -> None:
        """Keeps the blocks that a faulty row wrote or read out of the prefix cache. The sequence may have left its row
        by now, and others that share its blocks may have been admitted.
        """
        self.blocks.forget(sequence.block_table or sequence.former_block_table)
        self.blocks.reset_cache()

    def _register_blocks(self, sequence: Sequence, num_computed: int) -> None:
        """Offers to the prefix cache the blocks whose ids are known and whose last slot a plan writes."""
        if not self._enable_prefix_caching:
            return
        blocks, size, tokens = self.blocks, self.blocks.block_size, sequence.token_ids
        num_full = min(num_computed, len(tokens)) // size
        if num_full <= sequence.num_registered_blocks:
            return
        salt = sequence.request.cache_salt
        blocks.extend_keys(sequence.block_keys, tokens, salt)
        for index in range(sequence.num_registered_blocks, num_full):
            sequence.parent_block = blocks.register(
                sequence.block_table[index],
                sequence.block_keys[index],
                sequence.parent_block,
                salt,
                tokens[index * size : (index + 1) * size].tobytes(),
            )
        sequence.num_registered_blocks = num_full
