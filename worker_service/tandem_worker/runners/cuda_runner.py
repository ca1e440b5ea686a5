"""Executes step plans on an NVIDIA GPU, fast: CUDA graphs over state that lives on the device.

A steady decode step costs the CPU one small copy to the device, two graph launches (three where ranks must put their
logits together) and one copy of the ids back. A step with chunks of prompts is packed without padding between them and
padded to the next captured number of tokens; where none is near, its kernels are launched one by one. Nothing waits for
the GPU.
"""

import functools
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from tandem_shared.step_plan import Int32Array, NewRow, StepPlan, WorkerInfo
from tandem_worker.kernels import launcher
from tandem_worker.kernels.prefill_attention import QUERIES, cut_tiles
from tandem_worker.kernels.sampling import MAX_TOP_K, SamplingKernels
from tandem_worker.kernels.step_input import begin_decode, embed
from tandem_worker.layers.triton_operations import MixedMetadata, TritonOperations
from tandem_worker.models.model import Model
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.cuda_graphs import MAX_PADDING, Graphs, batch_sizes, token_counts
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.sampler import sample
from tandem_worker.runners.step_results import HostLogprobs, PendingStep, Timing, report_logprobs
from tandem_worker.runners.transfers import copy_to, to_device, to_host

NOBODY = -1
SAMPLER_KINDS = ("plain", "truncated")
SPARE_TILES = 8
"""In captured steps, for chunks that don't fill their last tile."""
MIN_SPLIT_TOKENS = 1536
"""Of steps that a tensor-parallel group computes in two parts, to hide one's sums behind the other's work."""
ALIGNMENT = 4
"""In elements: kernels expect arrays to start at 16 bytes."""

Sliceable = TypeVar("Sliceable", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class MixedShape:
    """The sizes that a step with chunks is launched for, its own or those it is padded to."""

    part_tokens: tuple[int, ...]
    """Tokens of each part that goes through the layers by itself"""
    part_tiles: tuple[int, ...]
    num_decode_rows: int

    @property
    def num_tokens(self) -> int:
        return sum(self.part_tokens)


class CudaRunner:
    """A model, its KV pool and the persistent batch, on one GPU. The model's operations are TritonOperations."""

    def __init__(
        self, model: Model, cache: torch.Tensor, batch: Batch, info: WorkerInfo, *, use_graphs: bool = True
    ) -> None:
        """cache (layers, 2, blocks, block_size, KV heads, head_dim). Captures the graphs, unless there are to be none:
        then steps run the same kernels, padded to the same sizes, one launch after the other.
        """
        self.info = info
        self.model = model
        assert isinstance(model.operations, TritonOperations)
        self._operations = model.operations
        self.cache = cache
        self._batch = batch
        device = self._device = cache.device
        num_rows = batch.num_rows
        self._options = RowOptions(num_rows, device)
        # The end of the step that was queued last, for the GPU's idle time before the next.
        self._ended: torch.cuda.Event | None = None

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._block_tables = zeros(*batch.block_tables.shape)
        # Tokens of each row whose KV is there once the step that is queued last has run.
        self._context_lens = zeros(num_rows)
        self.last_tokens = zeros(num_rows)
        self._sampled = zeros(num_rows)
        dtype, max_tokens = model.embed_tokens.weight.dtype, batch.max_num_batched_tokens
        # Of steps with chunks: embeddings, to which the layers add in place.
        peers = model.communicator.peer_all_reduce
        self._hidden = (
            peers.hidden if peers else torch.zeros(max_tokens, model.config.hidden_size, dtype=dtype, device=device)
        )
        self.logits = torch.zeros(num_rows, info.vocab_size, dtype=dtype, device=device)
        communicator = model.communicator
        self._sampling = self._plain_sampling = SamplingKernels(num_rows, info.vocab_size, device)
        # Of this rank's part of the vocabulary; all of it is put together in `logits` for the samplers that need it.
        self._local_logits = self.logits
        if communicator.shard.size > 1:
            self._local_logits = self.logits.new_zeros(num_rows, model.lm_head.num_rows)
            self._plain_sampling = SamplingKernels(
                num_rows, info.vocab_size, device, communicator.shard, communicator.all_gather
            )
        # Block table updates: their number, then row, index and block of each. Then the rows that sample.
        self._decode_sections = [1 + 3 * num_rows, num_rows]
        self._sizes = batch_sizes(num_rows)
        self._mixed_shapes = [
            MixedShape(parts, tuple(-(-part // QUERIES) + SPARE_TILES for part in parts), num_decode_rows)
            for parts in map(self._part_tokens, token_counts(max_tokens))
            for num_decode_rows in (0, num_rows)
        ]
        parts = self._part_tokens(max_tokens)
        most = MixedShape(parts, tuple(part // QUERIES + num_rows for part in parts), num_rows)
        self._input = zeros(max(_length(self._mixed_sections(shape)) for shape in (most, *self._mixed_shapes)))
        self._updates, self._rows = _split(self._input, self._decode_sections)
        self._parts: dict[str, Any] = {
            "decode": self._forward_decode,
            "mixed": self._forward_mixed,
            "head": self._compute_logits,
            "gather": self._gather_logits,
            "sample": self._sample,
        }
        self._graphs = Graphs()
        if use_graphs:
            self._capture()

    @property
    def progress(self) -> int:
        """Kernels compiled: the steps' results tell the rest."""
        return launcher.num_compiled

    def reset(self) -> None:
        self._batch.reset()
        self._ended = None

    def close(self) -> None:
        torch.cuda.synchronize()
        self._graphs.clear()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Applies the plan and queues its work; InvalidPlan, with nothing applied, if the batch can't follow it."""
        work = self._batch.apply(plan)
        self._add(plan.added_rows)
        rows = work.sampling_rows
        size = next(size for size in self._sizes if size >= len(rows))
        launches: list[tuple[Hashable, ...]]
        if len(work.chunk_rows):
            shape = self._shape_of(work)
            host = self._mixed_input(plan, work, shape)
            launches = [("mixed", shape), *([("head", size)] if len(rows) else [])]
        else:
            host = self._decode_input(plan, work)
            launches = [("decode", size)]
        kind = self._sampler_kind(rows)
        num_logprobs = self._options.num_logprobs[rows].tolist()
        if self._local_logits is not self.logits and (kind != "plain" or max(num_logprobs, default=-1) >= 0):
            launches.append(("gather", size))
        if kind in SAMPLER_KINDS and len(rows):
            launches.append(("sample", size, kind))
        prepared_ns = time.time_ns()
        started = _record_event()
        copy_to(self._input[: len(host)], host)
        for part, *arguments in launches:
            self._launch(part, *arguments)
        if kind not in SAMPLER_KINDS:
            self._sample_generally(rows)
        logprobs = self._report(num_logprobs)
        token_ids = to_host(self._sampled[: len(rows)])
        previous_ended, self._ended = self._ended, _record_event()
        timing = Timing(prepared_ns, started, self._ended, previous_ended)
        return PendingStep(plan.step_id, rows.tolist(), token_ids, timing, num_logprobs, logprobs)

    def _launch(self, *key: Any) -> None:
        """Replays a part's graph; without one, launches its kernels."""
        if key in self._graphs:
            self._graphs.replay(key)
        else:
            part, *arguments = key
            self._parts[part](*arguments)

    def _capture(self) -> None:
        mixed: list[tuple[Any, ...]] = [("mixed", shape) for shape in reversed(self._mixed_shapes)]
        others: list[tuple[Any, ...]] = []
        for size in reversed(self._sizes):
            others += [("decode", size), ("head", size), *(("sample", size, kind) for kind in SAMPLER_KINDS)]
            others += [("gather", size)] if self._local_logits is not self.logits else []
        keys = mixed + others
        for key in keys:
            if key in mixed:
                host = self._empty_input(key[1])
                copy_to(self._input[: len(host)], host)
            # Not while capturing: it may load kernels and initialise libraries.
            self._launch(*key)
        torch.cuda.synchronize()
        for key in keys:
            self._graphs.capture(key, functools.partial(self._launch, *key))

    def _add(self, new_rows: tuple[NewRow, ...]) -> None:
        if not new_rows:
            return
        self._options.set(new_rows)
        tables = np.zeros((len(new_rows), max(len(new.block_ids) for new in new_rows)), np.int32)
        for table, new in zip(tables, new_rows, strict=True):
            table[: len(new.block_ids)] = new.block_ids
        rows = to_device(np.array([new.row for new in new_rows]), self._device)
        self._block_tables[rows, : tables.shape[1]] = to_device(tables, self._device)

    # Decode steps

    def _decode_input(self, plan: StepPlan, work: StepWork) -> Int32Array:
        host = np.full(_length(self._decode_sections), NOBODY, np.int32)
        updates, rows = _split(host, self._decode_sections)
        self._write_updates(plan, updates)
        rows[: len(work.decode_rows)] = work.decode_rows
        return host

    def _forward_decode(self, size: int) -> None:
        rows, embedding = self._rows[:size], self.model.embed_tokens
        x = begin_decode(
            rows, self._updates, self._block_tables, self._context_lens, self.last_tokens, embedding.weight,
            embedding.first_token,
        )  # fmt: skip
        self.model.communicator.all_reduce(x)
        metadata = self._operations.plan_decode(rows, self._context_lens, self._block_tables)
        (hidden,) = self.model(self.cache, (x, metadata))
        self.model.compute_local_logits(hidden, self._local_logits[:size])

    def _write_updates(self, plan: StepPlan, updates: Int32Array) -> None:
        """The blocks that the plan appends, as begin_decode wants them."""
        rows, blocks = plan.appended_block_rows, plan.appended_block_ids
        updates[0] = 0
        if not len(rows):
            return
        if len(np.unique(rows)) < len(rows):
            # More than one a row: their tables go over whole.
            for row in np.unique(rows).tolist():
                table = self._batch.block_tables[row, : self._batch.num_blocks[row]]
                self._block_tables[row, : len(table)] = to_device(table.copy(), self._device)
            return
        updates[0] = len(rows)
        updates[1 : 1 + 3 * len(rows)] = np.stack([rows, self._batch.num_blocks[rows] - 1, blocks], 1).ravel()

    # Steps with chunks of prompts: decoding rows' tokens come first

    def _shape_of(self, work: StepWork) -> MixedShape:
        """The next captured shape, if it is near. With decoding rows it has room for all, so that a kernel for another
        number of them need not be compiled now.
        """
        num_tokens = int(work.chunk_counts.sum()) + len(work.decode_rows)
        num_decode_rows = self._batch.num_rows if len(work.decode_rows) else 0
        fitting = next(
            shape
            for shape in self._mixed_shapes
            if shape.num_tokens >= num_tokens and shape.num_decode_rows == num_decode_rows
        )
        if fitting.num_tokens - num_tokens <= MAX_PADDING:
            part_tiles = _count_tiles(work, fitting.part_tokens)
            if all(count <= room for count, room in zip(part_tiles, fitting.part_tiles, strict=True)):
                return fitting
        part_tokens = self._part_tokens(num_tokens)
        return MixedShape(part_tokens, _count_tiles(work, part_tokens), num_decode_rows)

    def _part_tokens(self, num_tokens: int) -> tuple[int, ...]:
        """Decoding rows, which come first, fit in the first part."""
        if self.model.communicator.shard.size == 1 or num_tokens < max(MIN_SPLIT_TOKENS, 2 * self._batch.num_rows):
            return (num_tokens,)
        first = -(-num_tokens // (2 * QUERIES)) * QUERIES
        return first, num_tokens - first

    def _mixed_sections(self, shape: MixedShape) -> list[int]:
        """Lengths of updates, sampling rows, their places among the tokens, contexts of all rows, decoding rows, token
        ids, positions, slots, and each part's tiles.
        """
        num_rows, tokens, tiles = self._batch.num_rows, [shape.num_tokens] * 3, [5 * num for num in shape.part_tiles]
        return [*self._decode_sections, num_rows, num_rows, shape.num_decode_rows, *tokens, *tiles]

    def _empty_input(self, shape: MixedShape) -> Int32Array:
        """Rows that are nobody's, tiles without queries, and tokens that are padding: stored in block 0."""
        sections = self._mixed_sections(shape)
        host = np.zeros(_length(sections), np.int32)
        _, rows, _, _, decode_rows, *_ = _split(host, sections)
        rows.fill(NOBODY)
        decode_rows.fill(NOBODY)
        return host

    def _mixed_input(self, plan: StepPlan, work: StepWork, shape: MixedShape) -> Int32Array:
        batch, block_size = self._batch, self._batch.block_size
        host = self._empty_input(shape)
        sections = _split(host, self._mixed_sections(shape))
        updates, rows, places, context_lens, decode_rows, ids, positions, slots, *part_tiles = sections
        self._write_updates(plan, updates)
        num_decodes = len(work.decode_rows)
        decode_rows[:num_decodes] = work.decode_rows
        context_lens[:] = batch.num_computed
        # Of decoding rows the batch has counted this step's token.
        at = batch.num_computed[work.decode_rows] - 1
        positions[:num_decodes] = at
        slots[:num_decodes] = batch.block_tables[work.decode_rows, at // block_size] * block_size + at % block_size
        ids[:num_decodes] = NOBODY - work.decode_rows
        last_place = np.zeros(batch.num_rows, np.int32)
        last_place[work.decode_rows] = np.arange(num_decodes)
        token = num_decodes
        chunks = zip(work.chunk_rows.tolist(), work.chunk_starts.tolist(), work.chunk_counts.tolist(), strict=True)
        for row, first, count in chunks:
            tokens = slice(token, token + count)
            ids[tokens] = batch.token_ids[row][first : first + count]
            positions[tokens] = np.arange(first, first + count)
            slots[tokens] = batch.slots(row, first, count)
            token += count
            last_place[row] = token - 1
        rows[: len(work.sampling_rows)] = work.sampling_rows
        places[: len(work.sampling_rows)] = last_place[work.sampling_rows]
        for tiles, chunks_of_part in zip(part_tiles, deal_chunks(work, shape.part_tokens), strict=True):
            cut = cut_tiles(*chunks_of_part, num_decodes)
            tiles[: cut.size] = cut.ravel()
            num_decodes = 0
        return host

    def _forward_mixed(self, shape: MixedShape) -> None:
        parts = _split(self._input, self._mixed_sections(shape))
        updates, _, _, context_lens, decode_rows, ids, positions, slots, *part_tiles = parts
        nobody = decode_rows[:0]
        embedding = self.model.embed_tokens
        begin_decode(nobody, updates, self._block_tables, self._context_lens, self.last_tokens, embedding.weight)
        self._context_lens.copy_(context_lens)
        x = embed(ids, self.last_tokens, embedding.weight, self._hidden[: shape.num_tokens], embedding.first_token)
        self.model.communicator.all_reduce(x)
        decode = None
        if shape.num_decode_rows:
            decode = self._operations.plan_decode(decode_rows, self._context_lens, self._block_tables)
        inputs = []
        of_parts = (array.split(shape.part_tokens) for array in (x, positions, slots))
        for *tensors, tiles in zip(*of_parts, part_tiles, strict=True):
            part, part_positions, part_slots = tensors
            metadata = MixedMetadata(part_positions, part_slots, self._block_tables, tiles.view(-1, 5), decode)
            inputs.append((part, metadata))
            decode = None
        for (part, _), out in zip(inputs, self.model(self.cache, *inputs), strict=True):
            assert out.data_ptr() == part.data_ptr(), "the layers must add in place"

    def _compute_logits(self, size: int) -> None:
        """Of the sampling rows of a step with chunks."""
        first = _length(self._decode_sections)
        hidden = self._hidden.index_select(0, self._input[first : first + size])
        self.model.compute_local_logits(hidden, self._local_logits[:size])

    # Sampling

    def _gather_logits(self, size: int) -> None:
        self.model.lm_head.gather_logits(self._local_logits[:size], self.logits[:size])

    def _sampler_kind(self, rows: Int32Array) -> str:
        """The cheapest sampler that does what all the rows ask."""
        options = self._options
        top_k, has_threshold = options.top_k[rows], options.has_threshold[rows]
        if (top_k > MAX_TOP_K).any() or (has_threshold & (top_k == 0)).any():
            return "general"
        return "truncated" if (top_k > 0).any() else "plain"

    def _sample(self, size: int, kind: str) -> None:
        is_plain = kind == "plain"
        sampling, logits = (self._plain_sampling, self._local_logits) if is_plain else (self._sampling, self.logits)
        sampling(
            logits[:size], self._rows[:size], self._context_lens, self._options.on_device, self.last_tokens,
            self._sampled[:size], is_truncated=not is_plain,
        )  # fmt: skip

    def _sample_generally(self, rows: Int32Array) -> None:
        """The reference sampler: any top-k, and top-p or min-p without one."""
        device_rows = self._rows[: len(rows)].long()
        logits = self.logits[: len(rows)].float()
        options = self._options.of(device_rows, self._context_lens[device_rows].long())
        sampled = sample(logits, options, any_random=True, any_truncated=True).int()
        is_bad = logits.isnan().any(-1) | ~logits.amax(-1).isfinite()
        # torch's cumulative sums may differ from rank to rank.
        sampled = self.model.communicator.agree(sampled.masked_fill(is_bad, -1))
        self.last_tokens[device_rows] = sampled.clamp(min=0)
        self._sampled[: len(rows)] = sampled

    def _report(self, num_logprobs: list[int]) -> HostLogprobs | None:
        if max(num_logprobs, default=-1) < 0:
            return None
        count = len(num_logprobs)
        return report_logprobs(self.logits[:count].float(), self._sampled[:count].clamp(min=0), num_logprobs)


def deal_chunks(work: StepWork, part_tokens: tuple[int, ...]) -> Iterator[tuple[Int32Array, Int32Array, Int32Array]]:
    """The rows, starts and counts of each part's chunks; one that goes over the edge is two."""
    begins = len(work.decode_rows) + np.cumsum(work.chunk_counts) - work.chunk_counts
    edge = 0
    for num_tokens in part_tokens:
        before = np.clip(edge - begins, 0, work.chunk_counts)
        edge += num_tokens
        counts = np.clip(edge - begins, 0, work.chunk_counts) - before
        in_part = counts > 0
        yield work.chunk_rows[in_part], (work.chunk_starts + before)[in_part], counts[in_part]


def _count_tiles(work: StepWork, part_tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int((-(-counts // QUERIES)).sum()) for _, _, counts in deal_chunks(work, part_tokens))


def _length(sections: list[int]) -> int:
    """Of an array of sections that each start aligned."""
    return sum(-(-length // ALIGNMENT) * ALIGNMENT for length in sections)


def _split(array: Sliceable, sections: list[int]) -> list[Sliceable]:
    """Views of an array's sections."""
    starts = [_length(sections[:index]) for index in range(len(sections))]
    return [array[start : start + length] for start, length in zip(starts, sections, strict=True)]


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
