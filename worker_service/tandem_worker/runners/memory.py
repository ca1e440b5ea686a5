"""How many KV blocks there is memory for. On a GPU the largest step is run once to see what it leaves."""

import gc
from dataclasses import replace

import numpy as np
import torch

from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import MAX_LOGPROBS, RowSampling
from tandem_shared.step_plan import NewRow, StepPlan, WorkerInfo
from tandem_worker.models.model import Model
from tandem_worker.runners import kv_cache
from tandem_worker.runners.make_runner import make_runner


def measure_blocks(
    settings: WorkerSettings, model: Model, shape: kv_cache.KVCacheShape, device: torch.device, info: WorkerInfo
) -> int:
    """The blocks that fit beside the weights and the largest step; on a CPU, in the memory that the settings allow.

    Raises ModelError where there is too little memory for any.
    """
    if device.type == "cpu":
        return kv_cache.num_blocks_within(int(settings.kv_cache_memory_gib * 2**30), shape)
    plan = largest_step(info)
    num_blocks = int(plan.added_rows[-1].block_ids[-1]) + 1
    torch.cuda.empty_cache()
    cache = kv_cache.allocate(num_blocks, shape, device)
    runner = make_runner(model, cache, replace(info, num_blocks=num_blocks), use_graphs=not settings.enforce_eager)
    runner.execute(plan).wait()
    free, total = torch.cuda.mem_get_info(device)
    # This includes what torch and the graphs keep for the next step, which nothing else can have.
    used = total - free - cache.nbytes
    del runner, cache
    # A runner and its graphs refer to each other.
    gc.collect()
    torch.cuda.empty_cache()
    return kv_cache.num_blocks_within(int(total * settings.gpu_memory_utilization) - used, shape)


def largest_step(info: WorkerInfo) -> StepPlan:
    """Prompts that fill the token budget, spread over all rows that it has room for, all sampled from.

    The prompts are as long as can be, for attention's memory; each other row has one token, for the memory of
    what rows may ask of sampling.
    """
    num_rows = min(info.max_num_rows, info.max_num_batched_tokens)
    lengths, room = [], info.max_num_batched_tokens - num_rows
    for _ in range(num_rows):
        length = 1 + min(room, info.max_model_len - 1)
        lengths.append(length)
        room -= length - 1
    num_blocks = [-(-length // info.block_size) for length in lengths]
    sampling = RowSampling(
        top_p=0.95, presence_penalty=1.0, num_logprobs=MAX_LOGPROBS, num_prompt_logprobs=MAX_LOGPROBS
    )
    ends = np.cumsum(num_blocks) + 1
    return StepPlan(
        step_id=1,
        added_rows=tuple(
            NewRow(
                row=row,
                sequence_id=row,
                token_ids=np.zeros(length, np.int32),
                num_prompt_tokens=length,
                num_computed_tokens=0,
                num_cached_tokens=0,
                block_ids=np.arange(end - count, end, dtype=np.int32),
                sampling=sampling,
            )
            for row, (length, count, end) in enumerate(zip(lengths, num_blocks, ends.tolist(), strict=True))
        ),
        chunk_rows=np.arange(num_rows, dtype=np.int32),
        chunk_num_tokens=np.array(lengths, np.int32),
    )
