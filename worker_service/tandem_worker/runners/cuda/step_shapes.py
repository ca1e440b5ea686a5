"""The sizes that steps are padded to, so that few CUDA graphs serve all of them. Knows no torch.

A captured graph computes one size. A decode step, in which every row computes one token, is padded to the next of a
ladder of batch sizes. A mixed step, which has chunks of prompts and may have decoding rows beside them, is padded to
the next of a ladder of token counts; where that would be much padding, it has a shape of its own and no graph.

Ranks of a tensor-parallel group compute a large mixed step as two micro-batches, so that the all-reduce of one hides
behind the other's work.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tandem_shared.step_plan import Int32Array
from tandem_worker.kernels.query_tiles import TILE_QUERIES
from tandem_worker.runners.batch import StepWork

MAX_PADDING_TOKENS = 256
"""Padding tokens of a mixed step, at most: computing them takes less time than launching a step's kernels one by one"""
SPARE_TILES = 8
"""Tiles that a captured mixed step has room for beyond its tokens' number, as a chunk's last tile may not be full"""
MIN_SPLIT_TOKENS = 1536
"""Tokens of the smallest step that a tensor-parallel group computes as two micro-batches"""


@dataclass(frozen=True)
class MixedShape:
    """The sizes that a mixed step is launched for: its own, or those that it is padded to."""

    micro_batch_tokens: tuple[int, ...]
    """Tokens of each micro-batch, that is, of each part of the step that goes through the layers by itself"""
    micro_batch_tiles: tuple[int, ...]
    """Tiles of queries (see query_tiles.py) of each micro-batch"""
    num_decode_rows: int
    """Decoding rows that there is room for; they are all in the first micro-batch."""

    @property
    def num_tokens(self) -> int:
        return sum(self.micro_batch_tokens)


class StepShapes:
    """The shapes of a batch of num_rows rows whose steps compute max_tokens tokens at most.

    is_sharded says whether a tensor-parallel group computes the steps.
    """

    def __init__(self, num_rows: int, max_tokens: int, *, is_sharded: bool) -> None:
        self.num_rows = num_rows
        self._min_split_tokens = max(MIN_SPLIT_TOKENS, 2 * num_rows) if is_sharded else max_tokens + 1
        self.batch_sizes = batch_sizes(num_rows)
        self.selection_sizes = sorted({min(2**power, num_rows) for power in range(num_rows.bit_length() + 1)})
        """The sizes that are captured of stages for some of the rows; their padding costs next to nothing."""
        self.mixed = [
            MixedShape(tokens, tuple(-(-count // TILE_QUERIES) + SPARE_TILES for count in tokens), num_decode_rows)
            for tokens in map(self._micro_batch_tokens, token_counts(max_tokens))
            for num_decode_rows in (0, num_rows)
        ]
        """The shapes that mixed steps are captured for, by ascending number of tokens"""
        tokens = self._micro_batch_tokens(max_tokens)
        self.largest = MixedShape(tokens, tuple(count // TILE_QUERIES + num_rows for count in tokens), num_rows)
        """No mixed step has more of anything; it is not captured."""

    def batch_size(self, num_rows: int) -> int:
        """The next captured batch size."""
        return next(size for size in self.batch_sizes if size >= num_rows)

    def selection_size(self, num_rows: int) -> int:
        """The next captured size of a stage for some of the rows."""
        return next(size for size in self.selection_sizes if size >= num_rows)

    def mixed_shape(self, work: StepWork) -> MixedShape:
        """The next captured shape where that is near, else the step's own.

        A step with decoding rows always has room for as many as the batch has, so that no kernel need be compiled for
        another number of them while requests wait.
        """
        num_tokens = int(work.chunk_counts.sum()) + len(work.decode_rows)
        num_decode_rows = self.num_rows if len(work.decode_rows) else 0
        fitting = next(
            shape for shape in self.mixed if shape.num_tokens >= num_tokens and shape.num_decode_rows == num_decode_rows
        )
        if fitting.num_tokens - num_tokens <= MAX_PADDING_TOKENS:
            num_tiles = _count_tiles(work, fitting.micro_batch_tokens)
            if all(count <= room for count, room in zip(num_tiles, fitting.micro_batch_tiles, strict=True)):
                return fitting
        tokens = self._micro_batch_tokens(num_tokens)
        return MixedShape(tokens, _count_tiles(work, tokens), num_decode_rows)

    def _micro_batch_tokens(self, num_tokens: int) -> tuple[int, ...]:
        """A step that is split has at least as many tokens in its first half as the batch has rows."""
        if num_tokens < self._min_split_tokens:
            return (num_tokens,)
        first = -(-num_tokens // (2 * TILE_QUERIES)) * TILE_QUERIES
        return first, num_tokens - first


def batch_sizes(max_rows: int) -> list[int]:
    """The ladder of batch sizes: dense where a step's time depends on them most, up to exactly max_rows."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_rows + 64, 64)]
    return sorted({min(size, max_rows) for size in ladder})


def token_counts(max_tokens: int) -> list[int]:
    """The ladder of mixed steps' token counts.

    It goes up to where computing a step takes longer than launching its kernels one by one. The full step is in it too,
    as most of a long prompt is computed in full steps.
    """
    ladder = [*range(64, 1024, 64), *range(1024, 2048, 128), *range(2048, 4097, MAX_PADDING_TOKENS)]
    return [*(count for count in ladder if count < max_tokens), max_tokens]


def deal_chunks(
    work: StepWork, micro_batch_tokens: tuple[int, ...]
) -> Iterator[tuple[Int32Array, Int32Array, Int32Array]]:
    """The rows, starts and counts of each micro-batch's chunks. A chunk that reaches over the edge becomes two."""
    begins = len(work.decode_rows) + np.cumsum(work.chunk_counts) - work.chunk_counts
    edge = 0
    for num_tokens in micro_batch_tokens:
        before = np.clip(edge - begins, 0, work.chunk_counts)
        edge += num_tokens
        counts = np.clip(edge - begins, 0, work.chunk_counts) - before
        has_tokens = counts > 0
        yield work.chunk_rows[has_tokens], (work.chunk_starts + before)[has_tokens], counts[has_tokens]


def _count_tiles(work: StepWork, micro_batch_tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int((-(-counts // TILE_QUERIES)).sum()) for _, _, counts in deal_chunks(work, micro_batch_tokens))
