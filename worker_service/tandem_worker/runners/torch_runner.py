"""Executes step plans in plain torch: batch update, forward pass, sampling. Queues nothing and decides nothing.

What a CPU runs, and the reference for runners/cuda/cuda_runner.py. A decoding row's input is its own last sampled
token, which stays on the device; so a step can be queued before the one before it has ended.
"""

import time

import numpy as np
import torch

from tandem_shared.step_plan import StepPlan, WorkerInfo
from tandem_worker.attention.torch_attention import AttentionMetadata, ChunkMetadata, group_decodes
from tandem_worker.models.model import Model
from tandem_worker.runners.batch import Batch, StepWork
from tandem_worker.runners.logits_stage import Grammars, LogitsStage
from tandem_worker.runners.logprobs import (
    QueuedLogprobs,
    QueuedPromptLogprobs,
    logprob_rows,
    pack_logprobs,
    prompt_positions,
)
from tandem_worker.runners.row_options import RowOptions
from tandem_worker.runners.sampler import sample
from tandem_worker.runners.step_results import NAN_LOGITS, NO_TOKEN, PendingStep, Timing
from tandem_worker.runners.transfers import to_host


class TorchRunner:
    """A model, its KV pool and the persistent batch, on one device."""

    def __init__(self, model: Model, cache: torch.Tensor, batch: Batch, info: WorkerInfo, grammars: Grammars) -> None:
        """cache (layers, 2, blocks, block_size, KV heads, head_dim)"""
        self.info = info
        self.model = model
        self.cache = cache
        self._batch = batch
        self._device = cache.device
        self._options = RowOptions(batch.num_rows, self._device)
        self._logits_stage = LogitsStage(info.vocab_size, grammars)
        # The end of the step that was queued last.
        self._ended: torch.cuda.Event | None = None
        self._last_token = torch.zeros(batch.num_rows, dtype=torch.int64, device=self._device)
        self.progress = 0
        if self._device.type == "cpu":
            # On a GPU a launched layer has not run yet, so this would tell nothing.
            model.after_layer = self._note_layer

    def reset(self) -> None:
        self._batch.reset()
        self._ended = None

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _note_layer(self) -> None:
        self.progress += 1

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Applies the plan and queues its work; InvalidPlan, with nothing applied, if the batch can't follow it."""
        work = self._batch.apply(plan)
        self._options.set(plan.added_rows)
        self._logits_stage.add(plan.added_rows)
        token_ids, metadata, sampling_indices = self._prepare(work)
        prepared_ns = time.time_ns()
        started = self._record_event()
        (hidden,) = self.model(self.cache, (self.model.embed_tokens(token_ids), metadata))
        rows = work.sampling_rows
        logits = self._logits(hidden[sampling_indices])
        adjusted, fault_codes = self._logits_stage.adjust(rows, logits)
        sampled = self._sample(rows, logits, adjusted)
        self._logits_stage.accept(rows, sampled)
        logprobs = self._logprobs(rows, logits, sampled)
        prompt_logprobs = self._prompt_logprobs(work, hidden)
        token_ids = to_host(sampled)
        previous_ended, self._ended = self._ended, self._record_event()
        timing = Timing(prepared_ns, started, self._ended, previous_ended)
        return PendingStep(plan.step_id, rows.tolist(), token_ids, timing, logprobs, prompt_logprobs, fault_codes)

    def _prepare(self, work: StepWork) -> tuple[torch.Tensor, AttentionMetadata, torch.Tensor]:
        """Token ids (tokens,), the attention metadata, and the indices of the tokens that are sampled from."""
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
        # The longest contexts come first, so that rows of similar length are neighbours. num_computed counts the tokens
        # of this step too.
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
            positions=self._to_device(np.concatenate(positions)),
            slot_mapping=self._to_device(np.concatenate(slots)),
            chunks=tuple(chunks),
            decode_start=start,
            decode_block_tables=self._to_device(batch.block_tables[decode_rows, :most_blocks]),
            decode_context_lens=self._to_device(context_lens),
            decode_groups=group_decodes(num_blocks.tolist(), block_size),
        )
        sampling_indices = self._to_device(last_index[work.sampling_rows])
        return token_ids, metadata, sampling_indices

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden_size) -> (tokens, vocab_size), in float32 or wider, as sampling needs them."""
        return widened(self.model.lm_head.gather_logits(self.model.compute_local_logits(hidden)))

    def _sample(self, rows: np.ndarray, logits: torch.Tensor, adjusted: torch.Tensor) -> torch.Tensor:
        """The tokens (rows,) from the adjusted logits (rows, vocab_size); NAN_LOGITS where the model's own logits are
        not finite, NO_TOKEN where the adjusted ones leave nothing.
        """
        device_rows = self._to_device(rows)
        # The sampled token comes after all computed ones.
        positions = self._to_device(self._batch.num_computed[rows])
        sampled = sample(
            adjusted,
            self._options.of(device_rows, positions),
            any_random=bool(self._options.is_random[rows].any()),
            any_truncated=bool(self._options.is_truncated[rows].any()),
        )
        if adjusted is not logits:
            sampled = sampled.masked_fill(adjusted.amax(-1) == -torch.inf, NO_TOKEN)
        is_bad = logits.isnan().any(-1) | ~logits.amax(-1).isfinite()
        sampled = self.model.communicator.agree(sampled.masked_fill(is_bad, NAN_LOGITS))
        self._last_token[device_rows] = sampled.clamp(min=0)
        return sampled

    def _logprobs(self, rows: np.ndarray, logits: torch.Tensor, sampled: torch.Tensor) -> QueuedLogprobs | None:
        asked = logprob_rows(rows, self._options)
        if asked is None:
            return None
        places = self._to_device(np.array(asked.places))
        requested_ids = self._to_device(asked.requested_ids)
        packed = pack_logprobs(logits[places], sampled[places].clamp(min=0), max(asked.num_top), requested_ids)
        return QueuedLogprobs(asked, to_host(packed))

    def _prompt_logprobs(self, work: StepWork, hidden: torch.Tensor) -> QueuedPromptLogprobs | None:
        asked = prompt_positions(work, self._batch, self._options)
        if asked is None:
            return None
        places, token_ids = self._to_device(asked.places), self._to_device(asked.token_ids)
        packed = []
        for part in asked.slices():
            logits = self._logits(hidden[places[part]])
            packed.append(to_host(pack_logprobs(logits, token_ids[part], asked.num_top)))
            if self._device.type == "cpu":
                self.progress += 1
        return QueuedPromptLogprobs(asked.parts, packed)

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        # The memory is pageable: the driver copies arrays this small before it returns, without waiting for the device.
        return torch.from_numpy(values.astype(np.int64)).to(self._device, non_blocking=True)


def widened(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 or wider, as sampling needs them."""
    return logits if logits.dtype == torch.float64 else logits.float()
