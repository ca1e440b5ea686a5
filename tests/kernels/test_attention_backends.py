"""Every attention backend against float64, one token at a time: through Triton's interpreter, or on a GPU.

A step has decoding rows, chunks of prompts and padding; its own KV is not in the pool yet, whose unused slots are NaN.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tandem_worker.attention.backend import CapturableAttention, MixedTokens
from tandem_worker.attention.torch_attention import (
    AttentionMetadata,
    ChunkMetadata,
    TorchAttention,
    group_decodes,
)
from tandem_worker.attention.triton_attention import TritonAttention
from tandem_worker.kernels.query_tiles import TILE_FIELDS, cut_tiles
from tandem_worker.layers.norm import RMSNorm
from tests.gpu.requirements import needs_flash_attn
from tests.kernels.comparison import DTYPE, EPS, ON_GPU, assert_near, random, slow_in_interpreter
from tests.kernels.paged_pool import ATTENTION_TOLERANCE, Pool, finish_plan, random_rotary, rotated

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLASH_BLOCK_SIZE = 256
MAX_ROWS = 8
SINGLE_TOKEN_TOLERANCE = 1e-1
NUM_PADDING = 3
CONTEXTS = [300, 1, 520, 77, 130]
DECODE_ROWS = [2, 0, 3]
CHUNKS = [(4, 0, 130), (0, 40, 90), (1, 0, 1)]
"""Row, first position and number of tokens; the row's context ends with them. Two begin where the prompt does."""
MORE_CHUNKS = [(4, 0, 130), (1, 0, 1)]

BACKENDS = [
    # Backend, heads, KV heads, head_dim, block size
    ("triton", 4, 2, 64, 16),
    slow_in_interpreter("triton", 4, 1, 32, 5),
    *([("triton", 16, 8, 128, FLASH_BLOCK_SIZE)] if ON_GPU else []),
    ("torch", 4, 2, 64, 16),
    pytest.param("flash-attn", 16, 8, 128, FLASH_BLOCK_SIZE, marks=needs_flash_attn),
    pytest.param("flash-attn", 4, 2, 64, FLASH_BLOCK_SIZE, marks=needs_flash_attn),
    pytest.param("flash-attn", 2, 2, 64, 2 * FLASH_BLOCK_SIZE, marks=needs_flash_attn),
]
STEPS = {
    "decode": (DECODE_ROWS, []),
    "mixed": ([2, 3], CHUNKS),
    "chunks": ([], CHUNKS),
    "more-rows": ([2, 0, 3], MORE_CHUNKS),
    "few-tokens": ([2], [(1, 0, 1)]),
}
"""By name: the rows that decode, and the chunks"""


@dataclass
class Step:
    """Tokens as (row, position): those of decoding rows first, then those of chunks."""

    pool: Pool
    decode_rows: list[int]
    chunks: list[tuple[int, int, int]]
    qkv: torch.Tensor
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    rotary: torch.Tensor

    @property
    def tokens(self) -> list[tuple[int, int]]:
        decodes = [(row, int(self.pool.context_lens[row]) - 1) for row in self.decode_rows]
        return decodes + [(row, first + i) for row, first, count in self.chunks for i in range(count)]

    @property
    def slots(self) -> torch.Tensor:
        return torch.cat([self.pool.slots(row, position, 1) for row, position in self.tokens])


def make_step(
    pool: Pool, decode_rows: list[int], chunks: list[tuple[int, int, int]], device: torch.device, has_norms: bool
) -> Step:
    """Its tokens' keys and values are in the pool's float64 account, and in qkv, but not in the cache."""

    def norm() -> RMSNorm | None:
        if not has_norms:
            return None
        module = RMSNorm(pool.head_dim, EPS, DTYPE).to(device)
        module.weight.copy_(random(pool.head_dim, device=device, scale=0.3) + 1)
        return module

    num_tokens = len(decode_rows) + sum(count for _, _, count in chunks)
    qkv = random(num_tokens + NUM_PADDING, pool.num_heads + 2 * pool.num_kv_heads, pool.head_dim, device=device)
    rotary = random_rotary(max(CONTEXTS), pool.head_dim, device)
    step = Step(pool, decode_rows, chunks, qkv, norm(), norm(), rotary)
    pool.cache.flatten(1, 2)[:, step.slots.to(device)] = float("nan")
    for index, (row, position) in enumerate(step.tokens):
        k, v = qkv[index, pool.num_heads :].split(pool.num_kv_heads)
        k_weight = None if step.k_norm is None else step.k_norm.weight
        pool.keys[row][position] = rotated(k, k_weight, rotary[position]).to(DTYPE).cpu()
        pool.values[row][position] = v.cpu()
    return step


def run_torch(step: Step, device: torch.device) -> torch.Tensor:
    """Plain torch wants chunks first."""
    pool, num_decodes = step.pool, len(step.decode_rows)
    num_tokens = len(step.tokens)
    order = torch.tensor([*range(num_decodes, num_tokens), *range(num_decodes)], device=device)
    chunks, start = [], 0
    for row, first, count in step.chunks:
        num_blocks = -(-(first + count) // pool.block_size)
        chunks.append(ChunkMetadata(start, count, first + count, pool.tables[row, :num_blocks].long()))
        start += count
    # Decoding rows of descending context, as group_decodes wants them.
    assert step.decode_rows == sorted(step.decode_rows, key=lambda row: -CONTEXTS[row])
    num_blocks = [-(-CONTEXTS[row] // pool.block_size) for row in step.decode_rows]
    metadata = AttentionMetadata(
        positions=torch.tensor([position for _, position in step.tokens], device=device)[order],
        slot_mapping=step.slots.to(device)[order],
        chunks=tuple(chunks),
        decode_start=start,
        decode_block_tables=pool.tables[step.decode_rows, : max(num_blocks, default=0)].long(),
        decode_context_lens=pool.context_lens[step.decode_rows].long(),
        decode_groups=group_decodes(num_blocks, pool.block_size),
    )
    out = torch.empty(num_tokens, pool.num_heads * pool.head_dim, dtype=DTYPE, device=device)
    qkv = step.qkv[:num_tokens][order]
    out[order] = TorchAttention()(qkv, step.q_norm, step.k_norm, step.rotary, pool.cache, metadata)
    return out


def make_attention(name: str, pool: Pool, device: torch.device) -> CapturableAttention:
    if name == "triton":
        return TritonAttention(MAX_ROWS, pool.num_heads, pool.num_kv_heads, pool.head_dim, device)
    from tandem_worker.attention.flash_attention import FlashAttention

    return FlashAttention(pool.block_size)


def ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run_decode(name: str, step: Step, device: torch.device) -> torch.Tensor:
    """A decode step, with padding rows at its end."""
    pool = step.pool
    attention = make_attention(name, pool, device)
    plan = attention.plan_decode(ints(step.decode_rows + [-1] * NUM_PADDING, device), pool.context_lens, pool.tables)
    finish_plan(device)
    return attention(step.qkv.clone(), step.q_norm, step.k_norm, step.rotary, pool.cache, plan)


def run_mixed(name: str, step: Step, device: torch.device) -> torch.Tensor:
    """A mixed step with padding tokens, stored in block 0, padding tiles, and more padding rows than tokens."""
    pool = step.pool
    rows, starts, counts = map(np.array, zip(*step.chunks, strict=True))
    tiles = cut_tiles(rows, starts, counts, len(step.decode_rows))
    tiles = np.concatenate([tiles, np.zeros((4, TILE_FIELDS), np.int32)])
    decode_rows = step.decode_rows + [-1] * (MAX_ROWS - len(step.decode_rows))
    tokens = MixedTokens(
        positions=ints([position for _, position in step.tokens] + [0] * NUM_PADDING, device),
        slots=ints([*step.slots.tolist(), *[0] * NUM_PADDING], device),
        block_tables=pool.tables,
        context_lens=pool.context_lens,
        tiles=torch.from_numpy(tiles).to(device),
        decode_rows=ints(decode_rows, device) if step.decode_rows else None,
    )
    attention = make_attention(name, pool, device)
    plan = attention.plan_mixed(tokens)
    finish_plan(device)
    return attention(step.qkv.clone(), step.q_norm, step.k_norm, step.rotary, pool.cache, plan)


@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("step_name", STEPS)
@pytest.mark.parametrize(("name", "num_heads", "num_kv_heads", "head_dim", "block_size"), BACKENDS)
def test_each_tokens_attention_is_that_of_its_context(
    name: str, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, step_name: str, has_norms: bool,
    device: torch.device,
) -> None:  # fmt: skip
    decode_rows, chunks = STEPS[step_name]
    contexts = list(CONTEXTS)
    for row, first, count in chunks:
        contexts[row] = first + count
    pool = Pool(contexts, num_heads, num_kv_heads, head_dim, block_size, device, unused_entry=0)
    step = make_step(pool, decode_rows, chunks, device, has_norms)
    if name == "torch":
        out = run_torch(step, device)
    elif chunks:
        out = run_mixed(name, step, device)
    else:
        out = run_decode(name, step, device)
    q_weight = None if step.q_norm is None else step.q_norm.weight
    expected = torch.stack(
        [pool.attend(step.qkv[index], q_weight, step.rotary, *token) for index, token in enumerate(step.tokens)]
    )
    out = out[: len(expected)].cpu()
    assert_near(out, expected, ATTENTION_TOLERANCE)
    # A single wrong token must show, and there is more rounding in one than in all.
    for index in range(len(expected)):
        assert_near(out[index], expected[index], SINGLE_TOKEN_TOLERANCE)
    slots = step.slots.to(device)
    for stored, account in ((pool.cache[0], pool.keys), (pool.cache[1], pool.values)):
        expected = torch.stack([account[row][position] for row, position in step.tokens])
        assert_near(stored.flatten(0, 1)[slots].cpu(), expected)
