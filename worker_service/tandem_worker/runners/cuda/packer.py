"""Packs a step for the GPU: from a plan, and what the batch makes of it, to the step's input array and its shape.

Runs on the host alone and knows no torch. input_layout.py says what the array holds, step_shapes.py what size it has.
"""

from dataclasses import dataclass

import numpy as np

from tandem_shared.step_plan import Int32Array, StepPlan
from tandem_worker.kernels.query_tiles import cut_tiles
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.cuda.input_layout import PADDING_ROW, InputLayout, MixedSections
from tandem_worker.runners.cuda.step_shapes import MixedShape, StepShapes, deal_chunks


@dataclass(frozen=True)
class PackedStep:
    """A step's input, and the sizes that its kernels are launched for."""

    array: Int32Array
    """See input_layout.py"""
    mixed_shape: MixedShape | None
    """None for a decode step"""
    batch_size: int
    """Rows that logits are computed and tokens are sampled for, padding rows among them"""
    whole_table_rows: list[int]
    """Rows whose block tables must be written whole before the step, as the array can't say how they change"""


class Packer:
    """Packs the steps of a batch. To be asked after Batch.apply, with what that returned."""

    def __init__(self, batch: Batch, shapes: StepShapes, layout: InputLayout) -> None:
        self._batch, self._shapes, self._layout = batch, shapes, layout

    def pack(self, plan: StepPlan, work: StepWork) -> PackedStep:
        shape = None
        if len(work.chunk_rows):
            shape = self._shapes.mixed_shape(work)
            array = self.pack_padding(shape)
            self._fill_mixed(self._layout.mixed_sections(array, shape), work, shape)
        else:
            array = np.full(self._layout.decode_length, PADDING_ROW, np.int32)
        sections = self._layout.decode_sections(array)
        sections.sampling_rows[: len(work.sampling_rows)] = work.sampling_rows
        whole_table_rows = self._fill_block_updates(sections.block_updates, plan)
        return PackedStep(array, shape, self._shapes.batch_size(len(work.sampling_rows)), whole_table_rows)

    def pack_padding(self, shape: MixedShape) -> Int32Array:
        """The input of a mixed step that is all padding: its rows are padding rows, its tiles have no queries, and its
        tokens' KV goes to block 0.
        """
        array = np.zeros(self._layout.mixed_length(shape), np.int32)
        sections = self._layout.mixed_sections(array, shape)
        sections.sampling_rows.fill(PADDING_ROW)
        sections.decode_rows.fill(PADDING_ROW)
        return array

    def _fill_block_updates(self, updates: Int32Array, plan: StepPlan) -> list[int]:
        """The block table entries that change. Returns the rows whose tables must be written whole instead."""
        whole = [new.row for new in plan.added_rows]
        rows, blocks = plan.appended_block_rows, plan.appended_block_ids
        updates[0] = 0
        if not len(rows):
            return whole
        if len(np.unique(rows)) < len(rows):
            # A row gets several blocks, and the batch only tells where its last one stands.
            return sorted({*whole, *rows.tolist()})
        updates[0] = len(rows)
        updates[1 : 1 + 3 * len(rows)] = np.stack([rows, self._batch.num_blocks[rows] - 1, blocks], 1).ravel()
        return whole

    def _fill_mixed(self, sections: MixedSections[Int32Array], work: StepWork, shape: MixedShape) -> None:
        batch, block_size = self._batch, self._batch.block_size
        num_decodes = len(work.decode_rows)
        sections.decode_rows[:num_decodes] = work.decode_rows
        sections.context_lens[:] = batch.num_computed
        # The batch counts a decoding row's token of this step as computed.
        decode_positions = batch.num_computed[work.decode_rows] - 1
        decode_blocks = batch.block_tables[work.decode_rows, decode_positions // block_size]
        sections.positions[:num_decodes] = decode_positions
        sections.slots[:num_decodes] = decode_blocks * block_size + decode_positions % block_size
        sections.token_ids[:num_decodes] = -1 - work.decode_rows
        last_token = np.zeros(batch.num_rows, np.int32)
        last_token[work.decode_rows] = np.arange(num_decodes)
        token = num_decodes
        chunks = zip(work.chunk_rows.tolist(), work.chunk_starts.tolist(), work.chunk_counts.tolist(), strict=True)
        for row, first, count in chunks:
            tokens = slice(token, token + count)
            sections.token_ids[tokens] = batch.token_ids[row][first : first + count]
            sections.positions[tokens] = np.arange(first, first + count)
            sections.slots[tokens] = batch.slots(row, first, count)
            token += count
            last_token[row] = token - 1
        sections.sampling_tokens[: len(work.sampling_rows)] = last_token[work.sampling_rows]
        # Tiles count tokens from their micro-batch's first one; the first micro-batch begins with the decoding rows.
        first_token = num_decodes
        for tiles, micro_batch in zip(sections.tiles, deal_chunks(work, shape.micro_batch_tokens), strict=True):
            cut = cut_tiles(*micro_batch, first_token)
            tiles[: cut.size] = cut.ravel()
            first_token = 0
