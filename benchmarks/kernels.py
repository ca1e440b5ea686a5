"""Times of the kernels alone, beside what else could do their work, on one GPU.

Usage: python -m benchmarks.kernels OUT_JSON [linear|decode|prefill|sampling ...]

Each time is of one call within a CUDA graph of many, over as many sets of inputs, so that neither launches nor caches
flatter it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from worker_service.kernels import decode_attention, linear, prefill_attention
from worker_service.kernels.launcher import Kernel
from worker_service.kernels.sampling import SamplingKernels

DEVICE = torch.device("cuda")
HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE = 128, 8, 16
LAYERS = 28
EPS = 1e-6


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(0, scale)


def time_us(calls: list[Callable[[], Any]], rounds: int = 20) -> float:
    """Microseconds of one call."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def bench_copy() -> dict[str, float]:
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return {"copy_tb_s": 2 * 2**30 / time_us([lambda: target.copy_(source)]) / 1e6}


def bench_linear(out: dict[str, Any]) -> None:
    shapes = {
        "qkv": (4096, 1024, False),
        "o": (1024, 2048, False),
        "gate_up": (3072, 1024, True),
        "down": (1024, 3072, False),
    }
    if "8b" in sys.argv:
        shapes = {
            "qkv": (6144, 4096, False),
            "o": (4096, 4096, False),
            "gate_up": (12288, 4096, True),
            "down": (4096, 12288, False),
        }
    for name, (n, k, silu) in shapes.items():
        count = 28 if n * k < 2**24 else 8
        weights = [random(2 * n if silu else n, k, scale=k**-0.5) for _ in range(count)]
        norm = random(k)
        floor = weights[0].numel() * 2 / 3.0e6
        for m in (1, 4):
            x = random(m, k)
            residual = None if silu or name == "qkv" else random(m, n)
            times = {"cublas": time_us([lambda w=w: torch.mm(x, w.t()) for w in weights])}
            flags = {"NORM": name in ("qkv", "gate_up"), "SILU_MUL": silu, "RESIDUAL": residual is not None}
            target = residual if residual is not None else random(m, n)
            if m <= 16:
                for bn, bk, warps in (
                    (2, 1024, 1),
                    (2, 512, 1),
                    (2, 2048, 2),
                    (4, 1024, 2),
                    (1, 2048, 1),
                    (1, 2048, 2),
                    (2, 4096, 4),
                ):
                    if bk > triton.next_power_of_2(k) or (silu and bn * bk > 8192):
                        continue
                    calls = [
                        lambda w=w: VECTOR(
                            (triton.cdiv(n, bn), 1, 1),
                            x,
                            norm,
                            w,
                            target,
                            target,
                            n,
                            EPS,
                            K=k,
                            TOKENS=m,
                            BLOCK_M=triton.next_power_of_2(m),
                            BLOCK_N=bn,
                            BLOCK_K=bk,
                            **flags,
                            PDL=True,
                            num_warps=warps,
                        )
                        for w in weights
                    ]
                    times[f"vec n{bn} k{bk} w{warps}"] = time_us(calls)
            if m >= 8:
                for bn, bk, warps, stages, pre in (
                    (16, 128, 4, 4, 0),
                    (16, 256, 4, 4, 0),
                    (16, 256, 4, 4, 1),
                    (32, 128, 4, 4, 0),
                    (32, 128, 4, 4, 1),
                    (32, 256, 4, 3, 0),
                    (64, 64, 4, 5, 0),
                    (64, 128, 4, 3, 0),
                    (64, 128, 8, 3, 0),
                    (16, 512, 4, 2, 0),
                    (32, 64, 4, 6, 0),
                    (16, 128, 2, 4, 0),
                ):
                    if bn * bk * (4 if silu else 2) * stages + max(16, m) * bk * 2 * stages > 220000:
                        continue
                    if m >= 64 and bk >= 256:
                        continue
                    f = dict(flags, NORM=flags["NORM"] and m <= 16)
                    pf = min(1024, triton.next_power_of_2(k)) if pre else 0
                    calls = [
                        lambda w=w: FEW(
                            (triton.cdiv(n, bn), 1, 1),
                            x,
                            norm,
                            w,
                            target,
                            target,
                            m,
                            n,
                            EPS,
                            K=k,
                            BLOCK_M=max(16, m),
                            BLOCK_N=bn,
                            BLOCK_K=bk,
                            PREFETCH=pf,
                            LINE=64,
                            **f,
                            PDL=True,
                            num_warps=warps,
                            num_stages=stages,
                        )
                        for w in weights
                    ]
                    try:
                        times[f"few n{bn} k{bk} w{warps} s{stages} p{pre}"] = time_us(calls)
                    except Exception as error:
                        times[f"few n{bn} k{bk} w{warps} s{stages} p{pre}"] = 1e9
                        print("failed", str(error)[:80])
                        torch.cuda.synchronize()
            best = sorted(times.items(), key=lambda item: item[1])
            cub = times["cublas"]
            print(
                f"{name:8s} m {m:3d} floor {floor:6.2f} cublas {cub:6.2f} |",
                "; ".join(f"{a}: {b:.2f}" for a, b in best[:5]),
            )
            out[f"linear_{name}_{m}"] = times


VECTOR, FEW = Kernel(linear._vector_linear), Kernel(linear._few_linear)
DECODE, PREFILL = Kernel(decode_attention._decode_attention), Kernel(prefill_attention._prefill_attention)


def pool(num_rows: int, context: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    num_blocks = -(-context // BLOCK_SIZE)
    sets = max(1, min(LAYERS, int(20e9 / (num_rows * num_blocks * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 4))))
    caches = [random(2, num_rows * num_blocks + 1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(sets)]
    tables = (torch.randperm(num_rows * num_blocks, device=DEVICE).int() + 1).view(num_rows, num_blocks)
    return caches, tables


def bench_decode(out: dict[str, Any]) -> None:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        flash_attn_with_kvcache = None
    for heads in (16, 32):
        for num_rows, context in ((1, 640), (16, 640), (64, 640), (256, 640)):
            if heads == 32 and num_rows != 256:
                continue
            caches, tables = pool(num_rows, context)
            rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
            lens = torch.full((num_rows,), context, dtype=torch.int32, device=DEVICE)
            qkv = random(num_rows, heads + 2 * NUM_KV_HEADS, HEAD_DIM)
            norm, rotary = random(HEAD_DIM), random(context, 2, HEAD_DIM // 2)
            result = random(num_rows, heads * HEAD_DIM)
            partials = torch.empty(num_rows * 64 * heads, HEAD_DIM + 2, device=DEVICE)
            counters = torch.zeros(num_rows * NUM_KV_HEADS, dtype=torch.int32, device=DEVICE)
            times = {}
            for tile, warps, stages in ((64, 2, 3), (64, 4, 3), (32, 1, 4), (32, 2, 4), (128, 4, 2)):
                base = max(1, 132 * 8 // (num_rows * NUM_KV_HEADS))
                for splits in sorted(
                    {1, min(16, triton.next_power_of_2(base)), min(64, max(1, triton.next_power_of_2(base) // 2))}
                ):
                    if context // splits > 3000 or (splits > 1 and context // splits < tile // 2):
                        continue
                    for store in (True, False):
                        if not store and (tile, warps, num_rows) != (64, 2, 256):
                            continue
                        calls = [
                            lambda c=c: DECODE(
                                (NUM_KV_HEADS, num_rows, splits),
                                qkv,
                                norm,
                                norm,
                                rotary,
                                c[0],
                                c[1],
                                tables,
                                rows,
                                lens,
                                result,
                                partials,
                                counters,
                                tables.stride(0),
                                tile,
                                EPS,
                                0.1,
                                H=heads,
                                KVH=NUM_KV_HEADS,
                                D=HEAD_DIM,
                                GROUP_PAD=16,
                                BLOCK_SIZE=BLOCK_SIZE,
                                TILE=tile,
                                SPLITS=splits,
                                STORE=store,
                                PDL=True,
                                num_warps=warps,
                                num_stages=stages,
                            )
                            for c in caches
                        ]
                        times[f"t{tile} w{warps} s{stages} splits{splits} {'store' if store else ''}"] = time_us(calls)
            if flash_attn_with_kvcache is not None:
                big = [
                    c.view(2, -1, 256, NUM_KV_HEADS, HEAD_DIM)
                    if c.shape[1] * 16 % 256 == 0
                    else random(2, num_rows * -(-context // 256) + 1, 256, NUM_KV_HEADS, HEAD_DIM)
                    for c in caches
                ]
                bt = torch.randperm(num_rows * -(-context // 256), device=DEVICE).int().view(num_rows, -1)
                q = random(num_rows, 1, heads, HEAD_DIM)
                times["flash-attn"] = time_us(
                    [
                        lambda c=c: flash_attn_with_kvcache(
                            q, c[0], c[1], cache_seqlens=lens, block_table=bt, causal=True
                        )
                        for c in big
                    ]
                )
            nbytes = num_rows * context * NUM_KV_HEADS * HEAD_DIM * 4
            best = sorted(times.items(), key=lambda item: item[1])
            print(
                f"decode h{heads} {num_rows}x{context} floor {nbytes / 3e6:.1f} flash {times.get('flash-attn', 0):.1f} |",
                "; ".join(f"{a}: {b:.1f}" for a, b in best[:6]),
                "| noStore:",
                "; ".join(f"{a}: {b:.1f}" for a, b in best if "t64 w2" in a and "store" not in a),
            )
            out[f"decode_{heads}_{num_rows}x{context}"] = times


def bench_prefill(out: dict[str, Any]) -> None:
    for heads in (16, 32):
        for num_rows, length in ((4, 2048), (1, 8192)):
            if heads == 32 and num_rows != 4:
                continue
            caches, tables = pool(num_rows, length)
            caches = caches[:4]
            tokens = num_rows * length
            qkv = random(tokens, heads + 2 * NUM_KV_HEADS, HEAD_DIM)
            norm, rotary = random(HEAD_DIM), random(length, 2, HEAD_DIM // 2)
            result = random(tokens, heads * HEAD_DIM)
            times = {}
            import numpy as np

            for queries, keys, warps, stages in (
                (128, 128, 8, 2),
                (128, 64, 8, 2),
                (128, 64, 8, 3),
                (128, 64, 4, 3),
                (64, 64, 4, 3),
                (64, 128, 4, 2),
            ):
                tiles = torch.from_numpy(
                    prefill_attention.cut_tiles(
                        np.arange(num_rows), np.zeros(num_rows, int), np.full(num_rows, length), queries
                    )
                ).to(DEVICE)
                calls = [
                    lambda c=c: PREFILL(
                        (heads, len(tiles), 1),
                        qkv,
                        norm,
                        rotary,
                        c[0],
                        c[1],
                        tables,
                        tiles,
                        result,
                        tables.stride(0),
                        EPS,
                        0.1,
                        H=heads,
                        KVH=NUM_KV_HEADS,
                        D=HEAD_DIM,
                        BLOCK_SIZE=BLOCK_SIZE,
                        QUERIES=queries,
                        KEYS=keys,
                        PDL=True,
                        num_warps=warps,
                        num_stages=stages,
                    )
                    for c in caches
                ]
                try:
                    times[f"q{queries} k{keys} w{warps} s{stages}"] = time_us(calls)
                except Exception as error:
                    print("failed", queries, keys, warps, stages, str(error)[:80])
                    torch.cuda.synchronize()
            q, k, v = (
                random(tokens, heads, HEAD_DIM),
                random(tokens, NUM_KV_HEADS, HEAD_DIM),
                random(tokens, NUM_KV_HEADS, HEAD_DIM),
            )
            cu = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=DEVICE)
            try:
                from flash_attn import flash_attn_varlen_func

                times["flash-attn"] = time_us(
                    [lambda: flash_attn_varlen_func(q, k, v, cu, cu, length, length, causal=True)] * 4
                )
            except ImportError:
                pass
            try:
                qq, kk, vv = (t.view(num_rows, length, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
                from torch.nn.attention import SDPBackend, sdpa_kernel

                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    times["cudnn"] = time_us(
                        [
                            lambda: torch.nn.functional.scaled_dot_product_attention(
                                qq, kk, vv, is_causal=True, enable_gqa=True
                            )
                        ]
                        * 4
                    )
            except Exception as error:
                print("cudnn failed", str(error)[:100])
            flops = num_rows * length * length / 2 * 4 * heads * HEAD_DIM
            best = sorted(times.items(), key=lambda item: item[1])
            print(
                f"prefill h{heads} {num_rows}x{length} |",
                "; ".join(f"{a}: {b:.0f} us {flops / b / 1e6:.0f} TF" for a, b in best[:8]),
            )
            out[f"prefill_{heads}_{num_rows}x{length}"] = times


def bench_sampling(out: dict[str, Any]) -> None:
    vocab = 151936
    for num_rows in (1, 64, 256):
        kernels = SamplingKernels(num_rows, vocab, DEVICE)
        sets = [random(num_rows, vocab) for _ in range(4)]
        rows = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        options = {
            "temperature": torch.full((num_rows,), 0.6, device=DEVICE),
            "top_k": torch.full((num_rows,), 20, dtype=torch.int32, device=DEVICE),
            "top_p": torch.full((num_rows,), 0.95, device=DEVICE),
            "min_p": torch.zeros(num_rows, device=DEVICE),
            "seed": torch.arange(num_rows, device=DEVICE),
            "choice_index": torch.zeros(num_rows, dtype=torch.int64, device=DEVICE),
        }
        last, result = (torch.zeros(num_rows, dtype=torch.int32, device=DEVICE) for _ in range(2))
        for truncated in (False, True):
            us = time_us(
                [lambda s=s: kernels(s, rows, rows, options, last, result, is_truncated=truncated) for s in sets]
            )
            print(f"sampling {num_rows} truncated {truncated}: {us:.1f} us")
            out[f"sampling_{num_rows}_{truncated}"] = us


def main() -> None:
    out: dict[str, Any] = {"device": torch.cuda.get_device_name(), **bench_copy()}
    print(out)
    for name, bench in {
        "linear": bench_linear,
        "decode": bench_decode,
        "prefill": bench_prefill,
        "sampling": bench_sampling,
    }.items():
        if name in sys.argv:
            bench(out)
    Path(sys.argv[1]).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
