"""The layout of a step's input: one int32 array, which the host fills and the GPU's kernels read.

All that changes from step to step goes to the GPU as one array, so that a step costs one copy. The array consists of
sections, and each section starts at a multiple of 16 bytes, as the kernels expect. The sections of a decode step are
the first ones of a mixed step too. The same code views the sections of the host's numpy array and of the device's
tensor, and needs no torch for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tandem_worker.kernels.query_tiles import TILE_FIELDS
from tandem_worker.runners.cuda.step_shapes import MixedShape

PADDING_ROW = -1
"""What stands in place of a row's number where there is only padding; the kernels pass over it."""
ALIGNMENT = 4
"""Elements that a section's start is a multiple of: 16 bytes"""

Array = TypeVar("Array")
"""A numpy array, or a torch tensor"""


@dataclass(frozen=True)
class DecodeSections(Generic[Array]):
    """The sections of a decode step's input, as views of it."""

    block_updates: Array
    """(1 + 3 * rows,): how many block table entries change, then row, index and block of each"""
    sampling_rows: Array
    """(rows,): the rows whose next token is sampled, then padding rows. In a decode step these rows decode."""


@dataclass(frozen=True)
class MixedSections(DecodeSections[Array]):
    """The sections of a mixed step's input. One token of each decoding row comes first, then the chunks' tokens."""

    sampling_tokens: Array
    """(rows,): for each sampling row the index, among the step's tokens, of the token whose logits it needs"""
    context_lens: Array
    """(rows,): every row's tokens with KV once the step has run"""
    decode_rows: Array
    """(decoding rows,): the rows that decode, then padding rows"""
    token_ids: Array
    """(tokens,): ids, or -1 - row for the last token that was sampled for a row, which only the device knows"""
    positions: Array
    """(tokens,)"""
    slots: Array
    """(tokens,): where each token's KV is stored; slots of block 0 are for padding, and never read"""
    tiles: list[Array]
    """Each micro-batch's tiles of queries, (tiles * TILE_FIELDS,), then padding tiles: see query_tiles.cut_tiles"""


class InputLayout:
    """Views an input's sections, for a batch of num_rows rows."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._decode_lengths = [1 + 3 * num_rows, num_rows]
        self.decode_length = _total_length(self._decode_lengths)

    def mixed_length(self, shape: MixedShape) -> int:
        return _total_length(self._mixed_lengths(shape))

    def decode_sections(self, array: Array) -> DecodeSections[Array]:
        return DecodeSections(*_split(array, self._decode_lengths))

    def mixed_sections(self, array: Array, shape: MixedShape) -> MixedSections[Array]:
        (
            block_updates, sampling_rows, sampling_tokens, context_lens, decode_rows, token_ids, positions, slots,
            *tiles,
        ) = _split(array, self._mixed_lengths(shape))  # fmt: skip
        return MixedSections(
            block_updates, sampling_rows, sampling_tokens, context_lens, decode_rows, token_ids, positions, slots,
            tiles,
        )  # fmt: skip

    def sampling_tokens(self, array: Array) -> Array:
        """The section sampling_tokens of a mixed step's input. Where it lies does not depend on the step's shape."""
        section: Array = _split(array, [*self._decode_lengths, self._num_rows])[-1]
        return section

    def _mixed_lengths(self, shape: MixedShape) -> list[int]:
        tokens = [shape.num_tokens] * 3
        tiles = [TILE_FIELDS * count for count in shape.micro_batch_tiles]
        return [*self._decode_lengths, self._num_rows, self._num_rows, shape.num_decode_rows, *tokens, *tiles]


def _total_length(lengths: Sequence[int]) -> int:
    """The length of sections of these lengths, each padded so that the next one starts aligned."""
    return sum(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)


def _split(array: Any, lengths: Sequence[int]) -> list[Any]:
    starts = [_total_length(lengths[:index]) for index in range(len(lengths))]
    return [array[start : start + length] for start, length in zip(starts, lengths, strict=True)]
