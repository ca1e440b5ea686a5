"""Times of single steps on a GPU, without services: a decode step at many batch sizes, and prefill steps.

Usage: python -m benchmarks.step_times SIZE OUT_JSON [--profile]

SIZE is 0.6b or 8b; weights, KV pool and token ids are random. A step is timed by CUDA events over many steps queued one
after the other, so that launches are hidden if they can be.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.step_codec import PROTOCOL_VERSION
from shared.step_plan import NewRow, RowSampling, StepPlan, WorkerInfo
from worker_service import kv_cache
from worker_service.cuda_runner import CudaRunner
from worker_service.layers.triton_operations import TritonOperations
from worker_service.model_config import ModelConfig
from worker_service.models.qwen3 import Qwen3
from worker_service.startup import make_runner

COMMON = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
CONFIGS = {
    "0.6b": ModelConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        max_position_embeddings=40960, tie_word_embeddings=True, **COMMON,
    ),
    "8b": ModelConfig(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        max_position_embeddings=40960, tie_word_embeddings=False, **COMMON,
    ),
}  # fmt: skip
BLOCK_SIZE = 16
MAX_NUM_ROWS = 256
MAX_NUM_BATCHED_TOKENS = 8192
CONTEXT = 640
SAMPLINGS = {
    "temperature": RowSampling(temperature=0.6),
    "qwen3": RowSampling(temperature=0.6, top_k=20, top_p=0.95),
}


@torch.inference_mode()
def build(config: ModelConfig, num_blocks: int) -> CudaRunner:
    device = torch.device("cuda")
    operations = TritonOperations(
        MAX_NUM_ROWS, config.num_attention_heads, config.num_key_value_heads, config.head_dim, device
    )
    with device:
        model = Qwen3(config, operations, 40960, torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.normal_(1.0, 0.1) if "norm" in name else weight.normal_(0, 0.02)
    shape = kv_cache.shape_of(config, BLOCK_SIZE, torch.bfloat16)
    cache = kv_cache.allocate(num_blocks, shape, device).normal_()
    info = WorkerInfo(
        protocol_version=PROTOCOL_VERSION, worker_instance_id="", fingerprint="", model="", dtype="bfloat16",
        device="cuda", vocab_size=config.vocab_size, max_model_len=40960, num_blocks=num_blocks,
        block_size=BLOCK_SIZE, max_num_rows=MAX_NUM_ROWS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )  # fmt: skip
    started = time.perf_counter()
    runner = make_runner(model, cache, info, use_graphs=True)
    torch.cuda.synchronize()
    print(f"graphs captured in {time.perf_counter() - started:.1f} s")
    assert isinstance(runner, CudaRunner)
    return runner


class Driver:
    """Makes plans for a runner."""

    def __init__(self, runner: CudaRunner) -> None:
        self.runner = runner
        self._step_id = 0

    def step(self, **plan: Any) -> Any:
        self._step_id += 1
        return self.runner.execute(StepPlan(self._step_id, **plan))

    def reset(self) -> None:
        self.runner.reset()
        self._step_id = 0

    def start_decoding(self, num_rows: int, context: int, num_steps: int, sampling: RowSampling) -> None:
        """Rows of a context that is in the pool already, as a prefix hit would have it, with room for the steps."""
        self.reset()
        num_blocks = -(-(context + num_steps) // BLOCK_SIZE)
        rng = np.random.default_rng(0)
        ids = (rng.permutation(num_rows * num_blocks) + 1).astype(np.int32).reshape(num_rows, num_blocks)
        tokens = rng.integers(0, 10000, context).astype(np.int32)
        rows = tuple(
            NewRow(
                row=row, sequence_id="", token_ids=tokens, num_prompt_tokens=context,
                num_computed_tokens=context - 1, num_cached_tokens=context, block_ids=ids[row], sampling=sampling,
            )
            for row in range(num_rows)
        )  # fmt: skip
        every = np.arange(num_rows, dtype=np.int32)
        self.step(added_rows=rows, chunk_rows=every, chunk_num_tokens=np.ones(num_rows, np.int32)).wait()

    def prefill(self, num_rows: int, length: int) -> Any:
        """Queues whole prompts in one step."""
        self.reset()
        num_blocks = -(-length // BLOCK_SIZE)
        rows = tuple(
            NewRow(
                row=row, sequence_id="", token_ids=np.full(length, row, np.int32), num_prompt_tokens=length,
                num_computed_tokens=0, num_cached_tokens=0,
                block_ids=np.arange(row * num_blocks + 1, (row + 1) * num_blocks + 1, dtype=np.int32),
                sampling=SAMPLINGS["temperature"],
            )
            for row in range(num_rows)
        )  # fmt: skip
        every = np.arange(num_rows, dtype=np.int32)
        return self.step(added_rows=rows, chunk_rows=every, chunk_num_tokens=np.full(num_rows, length, np.int32))


def timed(run: Any, count: int) -> tuple[float, float]:
    """GPU milliseconds and host milliseconds of one of `count` runs."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host = time.perf_counter()
    start.record()
    for _ in range(count):
        run()
    end.record()
    host = time.perf_counter() - host
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count, host * 1e3 / count


def kernels_of(run: Any, count: int) -> list[tuple[str, float, float]]:
    """(kernel, calls a run, microseconds a run), the most expensive first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name][0] += 1 / count
            total[event.name][1] += event.time_range.elapsed_us() / count
    return sorted(((name, *numbers) for name, numbers in total.items()), key=lambda entry: -entry[2])


def main() -> None:
    size, out = sys.argv[1], Path(sys.argv[2])
    profile = "--profile" in sys.argv
    config = CONFIGS[size]
    runner = build(config, 256 * 64 + 1)
    driver = Driver(runner)
    result: dict[str, Any] = {"what": f"single steps, {size} shape", "device": torch.cuda.get_device_name()}
    for kind, sampling in SAMPLINGS.items():
        for num_rows in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256):
            if kind == "qwen3" and num_rows not in (1, 64, 256):
                continue
            count = 60
            driver.start_decoding(num_rows, CONTEXT, 2 * count, sampling)
            gpu_ms, host_ms = timed(driver.step, count)
            result[f"decode_{kind}_{num_rows}"] = {"gpu_ms": gpu_ms, "host_ms": host_ms}
            print(f"{kind} {num_rows:4d} rows: {gpu_ms:.3f} ms, host {host_ms:.3f} ms")
            if profile and num_rows in (1, 16, 64, 256) and kind == "temperature":
                kernels = kernels_of(driver.step, 5)
                result[f"decode_{kind}_{num_rows}"]["kernels"] = kernels
                for name, calls, us in kernels[:11]:
                    print(f"    {us:9.1f} us {calls:6.1f} x {us / calls:8.2f}  {name[:70]}")
    for num_rows, length in ((1, 1024), (4, 2048), (16, 512), (1, 8192)):
        gpu_ms, host_ms = timed(lambda n=num_rows, length=length: driver.prefill(n, length), 10)
        result[f"prefill_{num_rows}x{length}"] = {"gpu_ms": gpu_ms, "host_ms": host_ms}
        rate = num_rows * length / gpu_ms
        print(f"prefill {num_rows} x {length}: {gpu_ms:.2f} ms, host {host_ms:.2f} ms, {rate:.0f} k tok/s")
        if profile:
            for name, calls, us in kernels_of(lambda n=num_rows, length=length: driver.prefill(n, length), 3)[:10]:
                print(f"    {us:9.1f} us {calls:6.1f} x {us / calls:8.2f}  {name[:70]}")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
