"""The forward passes that the GPU runs: from a step's input, which is on the device, to its sampling rows' logits.

Each method launches kernels for one size and reads only what lies at a fixed place, so it can be captured in a graph.
"""

import torch

from tandem_worker.attention.backend import MixedTokens
from tandem_worker.kernels.query_tiles import TILE_FIELDS
from tandem_worker.kernels.step_input import begin_decode, embed
from tandem_worker.layers.triton_operations import TritonOperations
from tandem_worker.models.model import Model
from tandem_worker.runners.cuda.device_state import DeviceState
from tandem_worker.runners.cuda.input_layout import InputLayout
from tandem_worker.runners.cuda.step_shapes import MixedShape


class ForwardPass:
    """A model over its KV pool. The model's operations are TritonOperations."""

    def __init__(self, model: Model, cache: torch.Tensor, state: DeviceState, layout: InputLayout) -> None:
        """cache (layers, 2, blocks, block_size, KV heads, head_dim)"""
        assert isinstance(model.operations, TritonOperations)
        self._model, self._attention = model, model.operations.attention
        self._cache = cache
        self._state, self._layout = state, layout

    def decode(self, batch_size: int) -> None:
        """One token of each of the first batch_size sampling rows, up to the local logits."""
        state, model = self._state, self._model
        updates = self._layout.decode_sections(state.input).block_updates
        rows, embedding = state.sampling_rows[:batch_size], model.embed_tokens
        x = begin_decode(
            rows, updates, state.block_tables, state.context_lens, state.last_tokens, embedding.weight,
            embedding.first_token,
        )  # fmt: skip
        model.communicator.all_reduce(x)
        metadata = self._attention.plan_decode(rows, state.context_lens, state.block_tables)
        (hidden,) = model(self._cache, (x, metadata))
        model.compute_local_logits(hidden, state.local_logits[:batch_size])

    def mixed(self, shape: MixedShape) -> None:
        """The tokens of decoding rows and of chunks, up to the hidden states."""
        state, model = self._state, self._model
        sections = self._layout.mixed_sections(state.input, shape)
        no_rows = sections.decode_rows[:0]
        embedding = model.embed_tokens
        begin_decode(
            no_rows, sections.block_updates, state.block_tables, state.context_lens, state.last_tokens,
            embedding.weight,
        )  # fmt: skip
        state.context_lens.copy_(sections.context_lens)
        hidden = state.hidden[: shape.num_tokens]
        x = embed(sections.token_ids, state.last_tokens, embedding.weight, hidden, embedding.first_token)
        model.communicator.all_reduce(x)
        # Decoding rows are in the first micro-batch alone.
        decode_rows = sections.decode_rows if shape.num_decode_rows else None
        inputs = []
        per_token = (array.split(shape.micro_batch_tokens) for array in (x, sections.positions, sections.slots))
        for micro_batch, positions, slots, tiles in zip(*per_token, sections.tiles, strict=True):
            tokens = MixedTokens(
                positions, slots, state.block_tables, state.context_lens, tiles.view(-1, TILE_FIELDS), decode_rows
            )
            inputs.append((micro_batch, self._attention.plan_mixed(tokens)))
            decode_rows = None
        for (micro_batch, _), out in zip(inputs, model(self._cache, *inputs), strict=True):
            assert out.data_ptr() == micro_batch.data_ptr(), "the layers must add in place"

    def head(self, batch_size: int) -> None:
        """The local logits of a mixed step's sampling rows, from the hidden states."""
        # Where the indices lie does not depend on the step's shape.
        state = self._state
        indices = self._layout.sampling_tokens(state.input)[:batch_size]
        hidden = state.hidden.index_select(0, indices)
        self._model.compute_local_logits(hidden, state.local_logits[:batch_size])
