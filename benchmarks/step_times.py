"""Times of single steps on a GPU, without services: a decode step at many batch sizes, and prefill steps.

Usage: python -m benchmarks.step_times SIZE [--profile] [--rows N ...] [--out FILE] [--commit COMMIT]
       torchrun --nproc-per-node RANKS -m benchmarks.step_times ..., for a tensor-parallel group

SIZE is 0.6b, 8b or 32b; weights, KV pool and token ids are random. A step is timed by CUDA events over many steps
queued one after the other, so that launches are hidden if they can be. Rank 0 reports.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.checkpoint import COMMON, SIZES
from benchmarks.common import header, write_json
from benchmarks.step_driver import RowAsks, StepDriver
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_codec import PROTOCOL_VERSION
from tandem_shared.step_plan import WorkerInfo
from tandem_worker.attention.triton_attention import TritonAttention
from tandem_worker.checkpoint.model_config import ModelConfig
from tandem_worker.layers.triton_operations import TritonOperations
from tandem_worker.models.qwen3 import Qwen3
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.peer_memory import connect_peers
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners import kv_cache
from tandem_worker.runners.cuda.cuda_runner import CudaRunner
from tandem_worker.runners.make_runner import make_runner

CONFIGS = {
    size: ModelConfig(**{key: value for key, value in (COMMON | shape).items() if key in ModelConfig.__annotations__})
    for size, shape in SIZES.items()
    if size != "tiny"
}
BLOCK_SIZE = 16
MAX_NUM_ROWS = 256
MAX_NUM_BATCHED_TOKENS = 8192
CONTEXT = 640
NUM_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
PREFILLS = ((1, 1024), (4, 2048), (16, 512), (1, 8192))
NUM_KERNELS = 16
"""How many kernels a profile reports, the most expensive first."""
SAMPLINGS = {
    "temperature": RowSampling(temperature=0.6),
    "qwen3": RowSampling(temperature=0.6, top_k=20, top_p=0.95),
}


def join(config: ModelConfig) -> Communicator:
    """Joins the group of ranks that torchrun started; without torchrun, a group of one."""
    if "LOCAL_RANK" not in os.environ:
        return Communicator()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    communicator = Communicator(Shard(dist.get_rank(), dist.get_world_size()))
    num_ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    communicator.peer_all_reduce = connect_peers(
        communicator, num_ranks_here, MAX_NUM_BATCHED_TOKENS, config.hidden_size, device
    )
    return communicator


@torch.inference_mode()
def build(config: ModelConfig, num_blocks: int, communicator: Communicator) -> CudaRunner:
    device = torch.device("cuda", torch.cuda.current_device())
    local = communicator.shard.cut(config)
    attention = TritonAttention(
        MAX_NUM_ROWS, local.num_attention_heads, local.num_key_value_heads, local.head_dim, device
    )
    operations = TritonOperations(attention)
    with device:
        model = Qwen3(config, operations, 40960, torch.bfloat16, communicator)
    for name, weight in model.named_parameters():
        weight.normal_(1.0, 0.1) if "norm" in name else weight.normal_(0, 0.02)
    shape = kv_cache.shape_of(local, BLOCK_SIZE, torch.bfloat16)
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


def measure(driver: StepDriver, num_rows: Sequence[int], profile: bool, result: dict[str, Any]) -> None:
    count = 60
    for kind, sampling in SAMPLINGS.items():
        for rows in num_rows:
            if kind == "qwen3" and rows not in (1, 64, 256):
                continue
            driver.start_decoding([RowAsks(sampling)] * rows, CONTEXT, 2 * count)
            gpu_ms, host_ms = timed(driver.step, count)
            entry = result[f"decode_{kind}_{rows}"] = {"gpu_ms": gpu_ms, "host_ms": host_ms}
            print(f"{kind} {rows:4d} rows: {gpu_ms:.3f} ms, host {host_ms:.3f} ms")
            if profile and kind == "temperature":
                entry["kernels"] = report_kernels(kernels_of(driver.step, 5))
    for rows, length in PREFILLS:
        run = partial(driver.prefill, rows, length, SAMPLINGS["temperature"])
        gpu_ms, host_ms = timed(run, 10)
        entry = result[f"prefill_{rows}x{length}"] = {"gpu_ms": gpu_ms, "host_ms": host_ms}
        print(
            f"prefill {rows} x {length}: {gpu_ms:.2f} ms, host {host_ms:.2f} ms, {rows * length / gpu_ms:.0f} k tok/s"
        )
        if profile:
            entry["kernels"] = report_kernels(kernels_of(run, 3))


def report_kernels(kernels: list[tuple[str, float, float]]) -> list[dict[str, Any]]:
    for name, calls, us in kernels[:NUM_KERNELS]:
        print(f"    {us:9.1f} us {calls:6.1f} x {us / calls:8.2f}  {name[:70]}")
    return [{"name": name, "calls": round(calls, 1), "us": round(us, 1)} for name, calls, us in kernels[:NUM_KERNELS]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=CONFIGS)
    parser.add_argument("--profile", action="store_true", help="with the time of each kernel")
    parser.add_argument("--rows", type=int, nargs="+", default=NUM_ROWS, help="batch sizes of the decode steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="the commit that is measured; git is asked by default")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.size]
    communicator = join(config)
    is_reporting = communicator.shard.rank == 0
    if not is_reporting:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the end)
    driver = StepDriver(build(config, 256 * 64 + 1, communicator))
    result = header(f"single steps, {arguments.size} shape", arguments.commit)
    result |= {"device": torch.cuda.get_device_name(), "tp_size": communicator.shard.size}
    measure(driver, arguments.rows, arguments.profile, result)
    if arguments.out and is_reporting:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
