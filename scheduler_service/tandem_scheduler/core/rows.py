"""The decoding rows as arrays, so that a steady step costs numpy operations and not a loop over sequences."""

import heapq

import numpy as np

from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import Int32Array


class Rows:
    """The rows of the worker's batch: the sequence in each, and the progress of the decoding rows.

    All arrays have one entry per row, so their shape is (num_rows,).
    """

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows))
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.is_decoding = np.zeros(num_rows, np.bool_)
        # The position that the next planned step computes.
        self.next_position = np.zeros(num_rows, np.int32)
        # The position whose sample is the sequence's last token.
        self.last_position = np.zeros(num_rows, np.int32)
        # How many positions the row's blocks hold.
        self.capacity = np.zeros(num_rows, np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self.sequences) - len(self._free)

    def take(self, sequence: Sequence) -> int:
        """Takes the lowest free row, so that the worker's batch stays dense."""
        row = heapq.heappop(self._free)
        self.sequences[row] = sequence
        return row

    def give_back(self, row: int) -> None:
        self.sequences[row] = None
        self.is_decoding[row] = False
        heapq.heappush(self._free, row)

    def start_decoding(self, sequence: Sequence, block_size: int) -> None:
        row = sequence.row
        self.is_decoding[row] = True
        self.next_position[row] = len(sequence.token_ids)
        self.last_position[row] = sequence.max_len - 2
        self.capacity[row] = len(sequence.block_table) * block_size

    def decoding(self) -> Int32Array:
        """The rows that decode, ascending, shape (num_decoding,)."""
        return np.flatnonzero(self.is_decoding).astype(np.int32)

    def owner(self, row: int) -> Sequence:
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is free"
        return sequence

    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence is not None]
