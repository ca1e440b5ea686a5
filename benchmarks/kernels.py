"""Times of the kernels alone, beside what else could do their work, on one GPU.

Usage: python -m benchmarks.kernels OUT_JSON [COMMIT]

Shapes are Qwen3-0.6B's unless a name says 8b. A time is the median of one call within a CUDA graph of many, over as
many sets of inputs, so that neither launches nor caches flatter it. Attention is timed in every backend: `us` is our
kernels with blocks of 16 tokens, `us_256` our kernels with blocks of 256, `flash_attn_us` flash-attn with blocks of
256, where it is installed, and `torch_us` plain torch with blocks of 16.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import header, write_json
from tandem_worker.attention.backend import CapturableAttention, MixedTokens
from tandem_worker.attention.torch_attention import AttentionMetadata, TorchAttention, group_decodes
from tandem_worker.attention.triton_attention import TritonAttention
from tandem_worker.kernels.linear import few_token_linear, skinny_linear, suits_few_token_linear
from tandem_worker.kernels.query_tiles import cut_tiles
from tandem_worker.kernels.sampling import SamplingKernels
from tandem_worker.layers.norm import RMSNorm

DEVICE = torch.device("cuda")
HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE, VOCAB_SIZE = 128, 8, 16, 151936
NUM_HEADS = {"": 16, "8b ": 32}
FLASH_BLOCK_SIZE = 256
BACKENDS = [("us", "triton", BLOCK_SIZE), ("us_256", "triton", FLASH_BLOCK_SIZE)]
"""Key of the time, backend, block size"""
if find_spec("flash_attn"):
    BACKENDS.append(("flash_attn_us", "flash-attn", FLASH_BLOCK_SIZE))
MAX_TORCH_TOKENS = 200_000
"""Padded tokens of the largest decode step that plain torch is timed with: it gathers them all"""
EPS = 1e-6
POOL_BYTES, MAX_SETS, ROUNDS = 20e9, 28, 15


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, scale)


def time_us(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, which are captured as one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return round(statistics.median(times), 2)


def copy_tb_s() -> float:
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return round(2 * 2**30 / time_us([lambda: target.copy_(source)]) / 1e6, 3)


def contexts() -> Iterator[tuple[str, np.ndarray]]:
    """Rows' contexts, of one length and of many."""
    for num_rows in (1, 8, 16, 64, 256):
        yield f"{num_rows} x 640", np.full(num_rows, 640)
    for num_rows in (1, 16):
        yield f"{num_rows} x 8192", np.full(num_rows, 8192)
    for num_rows in (24, 64, 128, 256):
        yield f"{num_rows} of 100 to 2000", np.random.default_rng(num_rows).integers(100, 2000, num_rows)


def make_attention(name: str, max_rows: int, num_heads: int) -> CapturableAttention:
    if name == "triton":
        return TritonAttention(max_rows, num_heads, NUM_KV_HEADS, HEAD_DIM, DEVICE)
    from tandem_worker.attention.flash_attention import FlashAttention

    return FlashAttention(FLASH_BLOCK_SIZE)


def make_norms() -> tuple[RMSNorm, RMSNorm]:
    norms = (RMSNorm(HEAD_DIM, EPS, torch.bfloat16).to(DEVICE), RMSNorm(HEAD_DIM, EPS, torch.bfloat16).to(DEVICE))
    for norm in norms:
        norm.weight.copy_(random(HEAD_DIM))
    return norms


def decode_case(lengths: np.ndarray, num_heads: int, tb_s: float) -> dict[str, Any]:
    """One layer's attention of a decode step in each backend, with QK-norm, rotary embedding and KV store."""
    num_rows = len(lengths)
    num_bytes = int(lengths.sum()) * NUM_KV_HEADS * HEAD_DIM * 4
    num_sets = max(1, min(MAX_SETS, int(POOL_BYTES / num_bytes)))
    qkv, norms = random(num_rows, num_heads + 2 * NUM_KV_HEADS, HEAD_DIM), make_norms()
    rotary = random(int(lengths.max()), 2, HEAD_DIM // 2)
    context_lens = torch.from_numpy(lengths.astype(np.int32)).to(DEVICE)
    rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    case = {}
    for key, name, block_size in BACKENDS:
        num_blocks = -(-lengths // block_size)
        total = int(num_blocks.sum())
        tables = torch.zeros(num_rows, int(num_blocks.max()), dtype=torch.int32)
        for row, ids in enumerate(torch.split(torch.randperm(total).int() + 1, num_blocks.tolist())):
            tables[row, : len(ids)] = ids
        caches = [random(2, total + 1, block_size, NUM_KV_HEADS, HEAD_DIM) for _ in range(num_sets)]
        attention = make_attention(name, num_rows, num_heads)
        plan = attention.plan_decode(rows, context_lens, tables.to(DEVICE))
        case[key] = time_us([lambda c=c, a=attention, p=plan: a(qkv, *norms, rotary, c, p) for c in caches])
        del caches
    if num_rows * int(lengths.max()) <= MAX_TORCH_TOKENS:
        case["torch_us"] = time_us(torch_decodes(lengths, qkv, norms, rotary, num_sets))
    return {**case, "share_of_copy_bandwidth": round(num_bytes / case["us"] / 1e6 / tb_s, 3)}


def torch_decodes(
    lengths: np.ndarray, qkv: torch.Tensor, norms: tuple[RMSNorm, RMSNorm], rotary: torch.Tensor, num_sets: int
) -> list[Callable[[], Any]]:
    """The same in plain torch, with rows of descending contexts whose blocks lie side by side."""
    lengths = np.sort(lengths)[::-1]
    num_blocks = -(-lengths // BLOCK_SIZE)
    firsts = np.cumsum(num_blocks) - num_blocks
    tables = torch.from_numpy(firsts[:, None] + np.arange(num_blocks.max()) % num_blocks[:, None] + 1).to(DEVICE)
    context_lens = torch.from_numpy(lengths.copy()).to(DEVICE)
    positions = context_lens - 1
    slots = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0] * BLOCK_SIZE + positions % BLOCK_SIZE
    groups = group_decodes(num_blocks.tolist(), BLOCK_SIZE)
    metadata = AttentionMetadata(positions, slots, (), 0, tables, context_lens, groups)
    pool = (2, int(num_blocks.sum()) + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    attention = TorchAttention()
    caches = [random(*pool) for _ in range(min(num_sets, 4))]
    return [lambda c=c: attention(qkv, *norms, rotary, c, metadata) for c in caches]


def prefill_case(num_prompts: int, length: int, num_heads: int, num_before: int = 0) -> dict[str, Any]:
    """One layer's attention of chunks of prompts, of which num_before tokens are in the pool, in each backend, with
    QK-norm, rotary embedding and KV store. cuDNN's time is that of attention alone, of whole prompts.
    """
    num_tokens, context = num_prompts * length, num_before + length
    qkv, norms = random(num_tokens, num_heads + 2 * NUM_KV_HEADS, HEAD_DIM), make_norms()
    rotary = random(context, 2, HEAD_DIM // 2)
    rows, starts = np.arange(num_prompts), np.full(num_prompts, num_before)
    tiles = torch.from_numpy(cut_tiles(rows, starts, np.full(num_prompts, length))).to(DEVICE)
    positions = torch.arange(num_before, context, dtype=torch.int32, device=DEVICE).repeat(num_prompts)
    case = {}
    for key, name, block_size in BACKENDS:
        num_blocks = -(-context // block_size)
        tables = (torch.randperm(num_prompts * num_blocks).int() + 1).view(num_prompts, num_blocks).to(DEVICE)
        places = positions.view(num_prompts, length).long()
        slots = tables.gather(1, places // block_size) * block_size + places % block_size
        tokens = MixedTokens(
            positions, slots.flatten().int(), tables, torch.full((num_prompts,), context, device=DEVICE).int(), tiles,
            decode_rows=None,
        )  # fmt: skip
        cache = random(2, num_prompts * num_blocks + 1, block_size, NUM_KV_HEADS, HEAD_DIM)
        attention = make_attention(name, num_prompts, num_heads)
        plan = attention.plan_mixed(tokens)
        case[key] = time_us([lambda a=attention, p=plan, c=cache: a(qkv, *norms, rotary, c, p)] * 4)
    if not num_before:
        q, k, v = qkv.split([num_heads, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
        q, k, v = (x.unflatten(0, (num_prompts, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            case["cudnn_us"] = time_us(
                [lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)] * 4
            )
    num_pairs = num_prompts * length * (num_before + length / 2)
    return {**case, "tflop_s": round(num_pairs * 4 * num_heads * HEAD_DIM / case["us"] / 1e6, 1)}


def sampling_case(num_rows: int, is_truncated: bool) -> dict[str, Any]:
    kernels = SamplingKernels(num_rows, VOCAB_SIZE, DEVICE)
    rows, last, out = (torch.arange(num_rows, dtype=torch.int32, device=DEVICE) for _ in range(3))
    options = {
        "temperature": torch.full((num_rows,), 0.6, device=DEVICE),
        "top_k": torch.full((num_rows,), 20 if is_truncated else 0, dtype=torch.int32, device=DEVICE),
        "top_p": torch.full((num_rows,), 0.95, device=DEVICE),
        "min_p": torch.zeros(num_rows, device=DEVICE),
        "seed": torch.arange(num_rows, device=DEVICE),
        "choice_index": torch.zeros(num_rows, dtype=torch.int64, device=DEVICE),
    }
    sets = [random(num_rows, VOCAB_SIZE) for _ in range(4)]
    calls = [lambda s=s: kernels(s, rows, rows, options, last, out, is_truncated=is_truncated) for s in sets]
    return {"us": time_us(calls)}


def linear_case(num_outputs: int, width: int, num_tokens: int) -> dict[str, Any]:
    weights = [random(num_outputs, width, scale=width**-0.5) for _ in range(MAX_SETS)]
    x = random(num_tokens, width)
    ours = few_token_linear if suits_few_token_linear(num_tokens, width) else skinny_linear
    return {
        "us": time_us([lambda w=w: ours(x, w) for w in weights]),
        "cublas_us": time_us([lambda w=w: torch.mm(x, w.t()) for w in weights]),
    }


@torch.inference_mode()
def main() -> None:
    tb_s = copy_tb_s()
    cases: dict[str, dict[str, Any]] = {}

    def note(name: str, case: dict[str, Any]) -> None:
        cases[name] = case
        print(f"{name}: {case}", flush=True)

    for prefix, num_heads in NUM_HEADS.items():
        for name, lengths in contexts():
            if not prefix or name in ("64 x 640", "256 x 640", "16 x 8192"):
                note(f"{prefix}decode attention, {name}", decode_case(lengths, num_heads, tb_s))
        for num_prompts, length in ((4, 2048), (1, 8192)):
            note(f"{prefix}prefill attention, {num_prompts} x {length}", prefill_case(num_prompts, length, num_heads))
        case = prefill_case(1, 1024, num_heads, num_before=7168)
        note(f"{prefix}prefill attention, the last 1024 tokens of 8192", case)
    for num_rows in (1, 64, 256):
        for is_truncated in (False, True):
            kind = "top-k 20, top-p 0.95" if is_truncated else "temperature"
            note(f"sampling, {kind}, {num_rows} rows", sampling_case(num_rows, is_truncated))
    for name, shape in {"qkv": (4096, 1024), "down": (1024, 3072), "8b qkv": (6144, 4096)}.items():
        for num_tokens in (1, 4, 16, 64):
            note(f"linear, {name}, {num_tokens} tokens", linear_case(*shape, num_tokens))
    report = header("kernels alone", sys.argv[2] if len(sys.argv) > 2 else None)
    write_json(Path(sys.argv[1]), report | {"device": torch.cuda.get_device_name(), "copy_tb_s": tb_s, "cases": cases})


if __name__ == "__main__":
    main()
