"""Logits of the positions of known texts, through the worker's own forward passes, to compare with a reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.attention.torch_attention import AttentionMetadata, ChunkMetadata, DecodeGroup
from tandem_worker.runners.torch_runner import TorchRunner, widened

if TYPE_CHECKING:  # It needs triton.
    from tandem_worker.runners.cuda.cuda_runner import CudaRunner


@torch.inference_mode()
def teacher_forced_logits(runner: TorchRunner, token_ids: list[int], num_prefill: int) -> torch.Tensor:
    """(tokens, vocab_size): the first num_prefill positions as one chunk, the rest as decode steps of one token.

    Writes over blocks 1 and up of the runner's pool.
    """
    device, block_size = runner.cache.device, runner.info.block_size
    table = torch.arange(1, -(-len(token_ids) // block_size) + 1, device=device)
    ids = torch.tensor(token_ids, device=device)
    positions = torch.arange(len(token_ids), device=device)
    slots = table[positions // block_size] * block_size + positions % block_size
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    chunk = AttentionMetadata(
        positions=positions[:num_prefill],
        slot_mapping=slots[:num_prefill],
        chunks=(ChunkMetadata(0, num_prefill, num_prefill, table[: -(-num_prefill // block_size)]),),
        decode_start=num_prefill,
        decode_block_tables=nothing.view(0, 0),
        decode_context_lens=nothing,
        decode_groups=(),
    )
    hidden = runner.model(runner.cache, (runner.model.embed_tokens(ids[:num_prefill]), chunk))
    for position in range(num_prefill, len(token_ids)):
        here = slice(position, position + 1)
        step = AttentionMetadata(
            positions=positions[here],
            slot_mapping=slots[here],
            chunks=(),
            decode_start=0,
            decode_block_tables=table[None],
            decode_context_lens=positions[here] + 1,
            decode_groups=(DecodeGroup(1, len(table)),),
        )
        hidden += runner.model(runner.cache, (runner.model.embed_tokens(ids[here]), step))
    return widened(runner.model.compute_local_logits(torch.cat(hidden)))


@dataclass(frozen=True)
class ForcedText:
    """A known text, of which the first num_prompt tokens are computed in chunks and the others in a step each."""

    token_ids: Sequence[int]
    num_prompt: int


@torch.inference_mode()
def logits_through_plans(
    runner: "CudaRunner", texts: Sequence[ForcedText], max_chunk_tokens: int
) -> list[torch.Tensor]:
    """For each text the logits after its prompt and after each later token: (tokens - num_prompt + 1, vocab_size).

    The texts are rows of one batch from the first step on, so that chunks of some run beside decoding rows of others;
    chunks of all must fit a step. A decoding row gets its text's next token in place of the one that it sampled.
    """
    runner.reset()
    lengths = np.array([len(text.token_ids) for text in texts])
    prompt_lengths = np.array([text.num_prompt for text in texts])
    num_computed = np.zeros(len(texts), np.int64)
    added, removed = _interleaved_rows(texts, runner.info.block_size), np.empty(0, np.int64)
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    step_id = 0
    while (is_present := num_computed < lengths).any():
        step_id += 1
        is_decoding = is_present & (num_computed >= prompt_lengths)
        for row in np.flatnonzero(is_decoding).tolist():
            runner.last_tokens[row] = texts[row].token_ids[num_computed[row]]
        chunk_rows = np.flatnonzero(is_present & ~is_decoding)
        chunks = np.minimum(prompt_lengths - num_computed, max_chunk_tokens)[chunk_rows]
        runner.execute(
            StepPlan(
                step_id,
                removed_rows=removed.astype(np.int32),
                added_rows=added,
                chunk_rows=chunk_rows.astype(np.int32),
                chunk_num_tokens=chunks.astype(np.int32),
            )
        ).wait()
        num_computed[is_decoding] += 1
        num_computed[chunk_rows] += chunks
        for place, row in enumerate(np.flatnonzero(is_present & (num_computed >= prompt_lengths)).tolist()):
            logits[row].append(runner.logits[place].clone())
        added, removed = (), np.flatnonzero(is_present & (num_computed == lengths))
    return [widened(torch.stack(rows)) for rows in logits]


def _interleaved_rows(texts: Sequence[ForcedText], block_size: int) -> tuple[NewRow, ...]:
    """Greedy rows with blocks for the whole texts, no two of a row next to each other if there are several rows."""
    return tuple(
        NewRow(
            row=row,
            sequence_id=row,
            token_ids=np.array(text.token_ids[: text.num_prompt], np.int32),
            num_prompt_tokens=text.num_prompt,
            num_computed_tokens=0,
            num_cached_tokens=0,
            block_ids=np.arange(-(-len(text.token_ids) // block_size), dtype=np.int32) * len(texts) + row + 1,
            sampling=RowSampling(temperature=0.0),
        )
        for row, text in enumerate(texts)
    )


def relative_errors(out: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """||out - reference|| / ||reference|| of each row."""
    out, reference = out.double(), reference.double()
    return ((out - reference).norm(dim=-1) / reference.norm(dim=-1)).cpu().numpy()
