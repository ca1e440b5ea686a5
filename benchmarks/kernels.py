"""Times of the kernels alone, beside what else could do their work, on one GPU.

Usage: python -m benchmarks.kernels OUT_JSON [COMMIT]

Shapes are Qwen3-0.6B's unless a name says 8b. A time is the median of one call within a CUDA graph of many, over as
many sets of inputs, so that neither launches nor caches flatter it. flash-attn takes part where it is installed.
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
from tandem_worker.kernels.decode_attention import DecodeAttention
from tandem_worker.kernels.linear import few_token_linear, is_few, skinny_linear
from tandem_worker.kernels.prefill_attention import prefill_attention
from tandem_worker.kernels.query_tiles import cut_tiles
from tandem_worker.kernels.sampling import SamplingKernels

DEVICE = torch.device("cuda")
HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE, VOCAB_SIZE = 128, 8, 16, 151936
NUM_HEADS = {"": 16, "8b ": 32}
FLASH_BLOCK_SIZE = 256
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
    for num_rows in (24, 64, 128, 256):
        yield f"{num_rows} of 100 to 2000", np.random.default_rng(num_rows).integers(100, 2000, num_rows)


def decode_case(lengths: np.ndarray, num_heads: int, tb_s: float) -> dict[str, Any]:
    """One layer's attention of a decode step, QK-norm, rotary embedding and KV store among it."""
    num_rows, num_blocks = len(lengths), -(-lengths // BLOCK_SIZE)
    total = int(num_blocks.sum())
    num_bytes = int(lengths.sum()) * NUM_KV_HEADS * HEAD_DIM * 4
    num_sets = max(1, min(MAX_SETS, int(POOL_BYTES / num_bytes)))
    caches = [random(2, total + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(num_sets)]
    tables = torch.zeros(num_rows, int(num_blocks.max()), dtype=torch.int32)
    for row, ids in enumerate(torch.split(torch.randperm(total).int() + 1, num_blocks.tolist())):
        tables[row, : len(ids)] = ids
    context_lens = torch.from_numpy(lengths.astype(np.int32)).to(DEVICE)
    attention = DecodeAttention(num_rows, num_heads, NUM_KV_HEADS, HEAD_DIM, DEVICE)
    decode = attention.plan(torch.arange(num_rows, dtype=torch.int32, device=DEVICE), context_lens, tables.to(DEVICE))
    qkv, norm = random(num_rows, num_heads + 2 * NUM_KV_HEADS, HEAD_DIM), random(HEAD_DIM)
    rotary, out = random(int(lengths.max()), 2, HEAD_DIM // 2), random(num_rows, num_heads * HEAD_DIM)
    calls = [lambda c=c: attention(qkv, norm, norm, EPS, rotary, c, decode, out, stores=True) for c in caches]
    case = {"us": time_us(calls)}
    del caches
    if find_spec("flash_attn"):
        case["flash_attn_us"] = time_us(flash_attn_decodes(lengths, num_heads, num_sets))
    return {**case, "share_of_copy_bandwidth": round(num_bytes / case["us"] / 1e6 / tb_s, 3)}


def flash_attn_decodes(lengths: np.ndarray, num_heads: int, num_sets: int) -> list[Callable[[], Any]]:
    """flash-attn's paged decoding alone, whose blocks are of 256 tokens."""
    from flash_attn import flash_attn_with_kvcache

    most = -(-int(lengths.max()) // FLASH_BLOCK_SIZE)
    num_blocks = int((-(-lengths // FLASH_BLOCK_SIZE)).sum())
    # A row's last places are other rows' blocks, which are not read.
    tables = (torch.arange(len(lengths) * most, device=DEVICE).int() % num_blocks).view(-1, most)
    context_lens = torch.from_numpy(lengths.astype(np.int32)).to(DEVICE)
    q = random(len(lengths), 1, num_heads, HEAD_DIM)
    caches = [random(2, num_blocks, FLASH_BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(num_sets)]
    return [
        lambda c=c: flash_attn_with_kvcache(q, *c, cache_seqlens=context_lens, block_table=tables, causal=True)
        for c in caches
    ]


def prefill_case(num_prompts: int, length: int, num_heads: int) -> dict[str, Any]:
    """One layer's attention of whole prompts. The others get q and k normalised and rotated."""
    num_tokens = num_prompts * length
    qkv, norm = random(num_tokens, num_heads + 2 * NUM_KV_HEADS, HEAD_DIM), random(HEAD_DIM)
    rotary, out = random(length, 2, HEAD_DIM // 2), random(num_tokens, num_heads * HEAD_DIM)
    cache = random(2, 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.zeros(num_prompts, 1, dtype=torch.int32, device=DEVICE)
    tiles = cut_tiles(np.arange(num_prompts), np.zeros(num_prompts, int), np.full(num_prompts, length))
    tiles = torch.from_numpy(tiles).to(DEVICE)
    case = {"us": time_us([lambda: prefill_attention(qkv, norm, EPS, rotary, cache, tables, tiles, out)] * 4)}
    q, k, v = qkv.split([num_heads, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    if find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        ends = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=DEVICE)
        case["flash_attn_us"] = time_us(
            [lambda: flash_attn_varlen_func(q, k, v, ends, ends, length, length, causal=True)] * 4
        )
    q, k, v = (x.unflatten(0, (num_prompts, length)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        case["cudnn_us"] = time_us([lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)] * 4)
    return {**case, "tflop_s": round(num_prompts * length**2 * 2 * num_heads * HEAD_DIM / case["us"] / 1e6, 1)}


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
    ours = few_token_linear if is_few(num_tokens, width) else skinny_linear
    return {
        "us": time_us([lambda w=w: ours(x, w) for w in weights]),
        "cublas_us": time_us([lambda w=w: torch.mm(x, w.t()) for w in weights]),
    }


def main() -> None:
    tb_s = copy_tb_s()
    cases: dict[str, dict[str, Any]] = {}

    def note(name: str, case: dict[str, Any]) -> None:
        cases[name] = case
        print(f"{name}: {case}", flush=True)

    for prefix, num_heads in NUM_HEADS.items():
        for name, lengths in contexts():
            if not prefix or name in ("64 x 640", "256 x 640"):
                note(f"{prefix}decode attention, {name}", decode_case(lengths, num_heads, tb_s))
        for num_prompts, length in ((4, 2048), (1, 8192)):
            note(f"{prefix}prefill attention, {num_prompts} x {length}", prefill_case(num_prompts, length, num_heads))
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
