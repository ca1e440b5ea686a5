"""Logits of every position of a known text, through the worker's own forward pass, to compare with a reference."""

import numpy as np
import torch

from worker_service.layers.attention import AttentionMetadata, ChunkMetadata, DecodeGroup
from worker_service.model_runner import ModelRunner


@torch.inference_mode()
def teacher_forced_logits(runner: ModelRunner, token_ids: list[int], num_prefill: int) -> torch.Tensor:
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
        slot_mapping=slots[:num_prefill],
        chunks=(ChunkMetadata(0, num_prefill, num_prefill, table[: -(-num_prefill // block_size)]),),
        decode_start=num_prefill,
        decode_block_tables=nothing.view(0, 0),
        decode_context_lens=nothing,
        decode_groups=(),
    )
    hidden = [runner.model(ids[:num_prefill], positions[:num_prefill], runner.cache, chunk)]
    for position in range(num_prefill, len(token_ids)):
        here = slice(position, position + 1)
        step = AttentionMetadata(
            slot_mapping=slots[here],
            chunks=(),
            decode_start=0,
            decode_block_tables=table[None],
            decode_context_lens=positions[here] + 1,
            decode_groups=(DecodeGroup(1, len(table)),),
        )
        hidden.append(runner.model(ids[here], positions[here], runner.cache, step))
    return runner.model.compute_logits(torch.cat(hidden))


def relative_errors(out: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """||out - reference|| / ||reference|| of each row."""
    out, reference = out.double(), reference.double()
    return ((out - reference).norm(dim=-1) / reference.norm(dim=-1)).cpu().numpy()
