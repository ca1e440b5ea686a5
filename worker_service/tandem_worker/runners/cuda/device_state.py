"""What the GPU keeps of the batch from step to step, and the places that captured kernels read and write.

A graph holds the addresses that its kernels were captured with, so all tensors here are allocated once.
"""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_shared.step_plan import Int32Array
from tandem_worker.models.model import Model
from tandem_worker.runners.batch import Batch
from tandem_worker.runners.cuda.input_layout import InputLayout
from tandem_worker.runners.cuda.step_shapes import StepShapes
from tandem_worker.runners.transfers import copy_to, to_device


class DeviceState:
    """Tensors of one int32 for each row of the batch, unless they say otherwise."""

    def __init__(self, model: Model, batch: Batch, shapes: StepShapes, layout: InputLayout, device: torch.device):
        num_rows, vocab_size = batch.num_rows, model.config.vocab_size
        dtype, max_tokens = model.embed_tokens.weight.dtype, batch.max_num_batched_tokens

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.block_tables = zeros(*batch.block_tables.shape)  # (rows, most blocks of a row)
        # Tokens of each row with KV, once the step that is queued last has run.
        self.context_lens = zeros(num_rows)
        self.last_tokens = zeros(num_rows)
        # The step's sampled tokens, in the order of its sampling rows; negative where there is a fault.
        self.sampled = zeros(num_rows)
        length = max(layout.decode_length, *map(layout.mixed_length, (shapes.largest, *shapes.mixed)))
        self.input = zeros(length)  # see input_layout.py
        self.sampling_rows = layout.decode_sections(self.input).sampling_rows
        # The hidden states of mixed steps, to which the layers add in place: (tokens, hidden_size). All-reduces over
        # peer memory want them in theirs.
        peers = model.communicator.peer_all_reduce
        self.hidden = peers.hidden if peers else zeros(max_tokens, model.config.hidden_size, dtype=dtype)
        # The logits of the sampling rows, in their order, (rows, vocab_size). A rank of a group computes those of its
        # shard of the vocabulary. It puts the whole together only for the rows that need it, in the order of their
        # selection (selections.py).
        self.logits = zeros(num_rows, vocab_size, dtype=dtype)
        self.is_sharded = model.communicator.shard.size > 1
        self.local_logits = zeros(num_rows, model.lm_head.num_rows, dtype=dtype) if self.is_sharded else self.logits
        # What the logits stage makes of them for the rows that ask, in the same places.
        self.adjusted_logits = zeros(*self.local_logits.shape, dtype=torch.float32)
        self.all_adjusted_logits = self.adjusted_logits
        if self.is_sharded:
            self.all_adjusted_logits = zeros(num_rows, vocab_size, dtype=torch.float32)

    def write_block_tables(self, rows: Sequence[int], block_tables: Int32Array, num_blocks: Int32Array) -> None:
        """Writes the tables of these rows whole, from the batch's block_tables, of which num_blocks entries a row are
        in use.
        """
        if not rows:
            return
        tables = block_tables[rows, : num_blocks[rows].max()]
        places = to_device(np.array(rows), self.block_tables.device)
        self.block_tables[places, : tables.shape[1]] = to_device(tables, self.block_tables.device)

    def write_input(self, array: Int32Array) -> None:
        copy_to(self.input[: len(array)], array)
