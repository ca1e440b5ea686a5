"""Executes step plans on a device: batch update, forward pass, sampling. Queues nothing and decides nothing.

A decoding row's input is its own last sampled token, which stays on the device; so a step can be queued before
the one before it has ended.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.step_plan import (
    FAULT_NAN_LOGITS,
    NewRow,
    RowFault,
    RowLogprobs,
    StepPlan,
    StepResult,
    StepTimes,
    WorkerInfo,
)
from worker_service.batch import Batch, StepWork
from worker_service.layers.attention import AttentionMetadata, ChunkMetadata, group_decodes
from worker_service.models.qwen3 import Qwen3
from worker_service.sampler import SamplingRows, sample


class _RowOptions:
    """The rows' sampling options as device arrays, each (rows,), and what the host must know of them."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(num_rows, dtype=dtype, device=device)

        self.temperature, self.top_p, self.min_p = (zeros(torch.float32) for _ in range(3))
        self.top_k, self.seed, self.choice_index = (zeros(torch.int64) for _ in range(3))
        self.is_random = np.zeros(num_rows, np.bool_)
        self.is_truncated = np.zeros(num_rows, np.bool_)
        self.num_logprobs = np.full(num_rows, -1, np.int32)

    def set(self, new_rows: Sequence[NewRow]) -> None:
        if not new_rows:
            return
        rows = [new.row for new in new_rows]
        options = [new.sampling for new in new_rows]
        index = self._to_device(np.array(rows))
        self.temperature[index] = self._to_device(np.array([o.temperature for o in options], np.float32))
        self.top_p[index] = self._to_device(np.array([o.top_p for o in options], np.float32))
        self.min_p[index] = self._to_device(np.array([o.min_p for o in options], np.float32))
        self.top_k[index] = self._to_device(np.array([o.top_k for o in options]))
        self.seed[index] = self._to_device(np.array([o.seed for o in options], np.uint64).view(np.int64))
        self.choice_index[index] = self._to_device(np.array([o.choice_index for o in options]))
        self.is_random[rows] = [o.temperature > 0 for o in options]
        self.is_truncated[rows] = [o.temperature > 0 and (o.top_k > 0 or o.top_p < 1 or o.min_p > 0) for o in options]
        self.num_logprobs[rows] = [-1 if o.num_logprobs is None else o.num_logprobs for o in options]

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        # torch.tensor(..., device=...) would wait for the step that runs.
        return torch.from_numpy(values).to(self.temperature.device, non_blocking=True)

    def of(self, rows: torch.Tensor, positions: torch.Tensor) -> SamplingRows:
        return SamplingRows(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            choice_index=self.choice_index[rows],
            position=positions,
        )


@dataclass(frozen=True)
class _HostCopies:
    """What a step brings to the host, under way until the event."""

    token_ids: torch.Tensor  # (sampling rows,)
    is_bad: torch.Tensor  # (sampling rows,)
    logprobs: torch.Tensor | None  # (sampling rows,), of the sampled tokens
    top_ids: torch.Tensor | None  # (sampling rows, most asked for)
    top_logprobs: torch.Tensor | None


class _PendingStep:
    """A step whose kernels are queued."""

    def __init__(
        self,
        step_id: int,
        rows: list[int],
        num_logprobs: list[int],
        copies: _HostCopies,
        prepared_ns: int,
        events: tuple[torch.cuda.Event, torch.cuda.Event] | None,
    ) -> None:
        self._step_id = step_id
        self._rows = rows
        self._num_logprobs = num_logprobs
        self._copies = copies
        self._prepared_ns = prepared_ns
        self._events = events

    def wait(self) -> StepResult:
        gpu_duration_ns = 0
        if self._events:
            started, ended = self._events
            ended.synchronize()
            gpu_duration_ns = round(started.elapsed_time(ended) * 1e6)
        copies = self._copies
        is_bad = copies.is_bad.tolist()
        token_ids = copies.token_ids.tolist()
        return StepResult(
            step_id=self._step_id,
            num_token_ids=[0 if bad else 1 for bad in is_bad],
            token_ids=[token_id for token_id, bad in zip(token_ids, is_bad, strict=True) if not bad],
            faults=tuple(RowFault(row, FAULT_NAN_LOGITS) for row, bad in zip(self._rows, is_bad, strict=True) if bad),
            logprobs=self._reports(is_bad),
            times=StepTimes(prepared_ns=self._prepared_ns, sampled_ns=time.time_ns(), gpu_duration_ns=gpu_duration_ns),
        )

    def _reports(self, is_bad: list[bool]) -> tuple[RowLogprobs, ...]:
        copies = self._copies
        if copies.logprobs is None or copies.top_ids is None or copies.top_logprobs is None:
            return ()
        logprobs, top_ids, top_logprobs = (
            copies.logprobs.tolist(),
            copies.top_ids.tolist(),
            copies.top_logprobs.tolist(),
        )
        return tuple(
            RowLogprobs(row, logprobs[i], tuple(top_ids[i][:count]), tuple(top_logprobs[i][:count]))
            for i, (row, count) in enumerate(zip(self._rows, self._num_logprobs, strict=True))
            if count >= 0 and not is_bad[i]
        )


class ModelRunner:
    """A model, its KV pool and the persistent batch, on one device."""

    def __init__(self, model: Qwen3, cache: torch.Tensor, batch: Batch, info: WorkerInfo) -> None:
        """cache (layers, 2, blocks, block_size, KV heads, head_dim)"""
        self.info = info
        self.model = model
        self.cache = cache
        self._batch = batch
        self._device = cache.device
        self._options = _RowOptions(batch.num_rows, self._device)
        self._last_token = torch.zeros(batch.num_rows, dtype=torch.int64, device=self._device)

    def reset(self) -> None:
        self._batch.reset()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> _PendingStep:
        """Applies the plan and queues its work; InvalidPlan, with nothing applied, if the batch can't follow it."""
        work = self._batch.apply(plan)
        self._options.set(plan.added_rows)
        token_ids, positions, metadata, sampling_indices = self._prepare(work)
        prepared_ns = time.time_ns()
        events = None
        if self._device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        hidden = self.model(token_ids, positions, self.cache, metadata)
        copies = self._sample(work, hidden[sampling_indices])
        if events:
            events[1].record()
        rows = work.sampling_rows
        return _PendingStep(
            plan.step_id, rows.tolist(), self._options.num_logprobs[rows].tolist(), copies, prepared_ns, events
        )

    def _prepare(self, work: StepWork) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata, torch.Tensor]:
        """Token ids (tokens,), positions (tokens,), attention metadata, and which tokens are sampled from."""
        batch, block_size = self._batch, self._batch.block_size
        ids, positions, slots, chunks = [], [], [], []
        last_index = np.zeros(batch.num_rows, np.int64)
        start = 0
        for row, first, count in zip(
            work.chunk_rows.tolist(), work.chunk_starts.tolist(), work.chunk_counts.tolist(), strict=True
        ):
            end = first + count
            ids.append(batch.token_ids[row][first:end])
            positions.append(np.arange(first, end, dtype=np.int32))
            slots.append(batch.slots(row, first, count))
            table = self._to_device(batch.block_tables[row, : -(-end // block_size)])
            chunks.append(ChunkMetadata(start, count, end, table))
            start += count
            last_index[row] = start - 1
        # Longest context first, so that rows of like length stand together. The batch has counted this step's token.
        decode_rows = work.decode_rows[np.argsort(-batch.num_computed[work.decode_rows], kind="stable")]
        context_lens = batch.num_computed[decode_rows]
        num_blocks = -(-context_lens // block_size)
        decode_positions = context_lens - 1
        decode_blocks = batch.block_tables[decode_rows, decode_positions // block_size]
        positions.append(decode_positions)
        slots.append(decode_blocks * block_size + decode_positions % block_size)
        last_index[decode_rows] = start + np.arange(len(decode_rows))
        most_blocks = int(num_blocks.max(initial=0))
        last_tokens = self._last_token[self._to_device(decode_rows)]
        token_ids = torch.cat([self._to_device(np.concatenate(ids)), last_tokens]) if ids else last_tokens
        metadata = AttentionMetadata(
            slot_mapping=self._to_device(np.concatenate(slots)),
            chunks=tuple(chunks),
            decode_start=start,
            decode_block_tables=self._to_device(batch.block_tables[decode_rows, :most_blocks]),
            decode_context_lens=self._to_device(context_lens),
            decode_groups=group_decodes(num_blocks.tolist(), block_size),
        )
        sampling_indices = self._to_device(last_index[work.sampling_rows])
        return token_ids, self._to_device(np.concatenate(positions)), metadata, sampling_indices

    def _sample(self, work: StepWork, hidden: torch.Tensor) -> _HostCopies:
        """hidden (sampling rows, hidden_size)"""
        options, rows = self._options, work.sampling_rows
        device_rows = self._to_device(rows)
        logits = self.model.compute_logits(hidden)
        # The token stands after all that is computed.
        positions = self._to_device(self._batch.num_computed[rows])
        sampled = sample(
            logits,
            options.of(device_rows, positions),
            any_random=bool(options.is_random[rows].any()),
            any_truncated=bool(options.is_truncated[rows].any()),
        )
        is_bad = logits.isnan().any(-1) | ~logits.amax(-1).isfinite()
        sampled = sampled.masked_fill(is_bad, 0)
        self._last_token[device_rows] = sampled
        logprobs = top_ids = top_logprobs = None
        most = int(options.num_logprobs[rows].max(initial=-1))
        if most >= 0:
            distribution = logits.log_softmax(-1)
            logprobs = self._to_host(distribution.gather(1, sampled[:, None])[:, 0])
            tops = distribution.topk(min(most, logits.shape[1]), dim=-1)
            top_logprobs, top_ids = self._to_host(tops.values), self._to_host(tops.indices)
        return _HostCopies(self._to_host(sampled), self._to_host(is_bad), logprobs, top_ids, top_logprobs)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        # From pageable memory: the driver copies arrays this small before it returns, and does not wait for the device.
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        if values.device.type == "cpu":
            return values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)
