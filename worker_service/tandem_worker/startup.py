"""From settings to a runner: loads the model, measures the memory for its KV pool, allocates it."""

import gc
import importlib.util
import logging
import os
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tandem_shared.config import WorkerSettings, model_name
from tandem_shared.errors import ConfigError, ModelError
from tandem_shared.model_folder import ALL_FILES, resolve_model, tokenizer_digest
from tandem_shared.step_codec import PROTOCOL_VERSION
from tandem_shared.step_plan import NewRow, RowSampling, StepPlan, WorkerInfo
from tandem_worker.checkpoint.generation_config import read_generation_defaults
from tandem_worker.checkpoint.model_config import ModelConfig, read_model_config
from tandem_worker.checkpoint.weights import Loaded, fingerprint_of, load_weights
from tandem_worker.layers.operations import Operations, TorchOperations
from tandem_worker.models.qwen3 import Qwen3
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners import kv_cache
from tandem_worker.runners.batch import MAX_LOGPROBS, Batch
from tandem_worker.runners.runner import Runner
from tandem_worker.runners.torch_runner import TorchRunner

logger = logging.getLogger(__name__)


@torch.inference_mode()
def build_runner(settings: WorkerSettings, communicator: Communicator | None = None) -> Runner:
    """Loads a rank's part of a model and makes it ready. Raises ModelError or ConfigError, saying what is wrong."""
    communicator = communicator or Communicator()
    folder = resolve_model(settings.model, ALL_FILES)
    device, dtype = device_of(settings), _dtype_of(settings)
    # The ranks of one host share its CPUs. A launcher that does not say how many there are may have started one a host.
    num_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(settings.num_threads or max(1, torch.get_num_threads() // num_ranks_here))
    config = read_model_config(folder)
    defaults = read_generation_defaults(folder, config.vocab_size)
    for warning in defaults.warnings if communicator.shard.rank == 0 else ():
        logger.warning("%s", warning)
    wanted_len = settings.max_model_len or config.context
    if wanted_len > config.context:
        raise ConfigError(f"--max-model-len {wanted_len}: the model's context is {config.context}")
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise ConfigError("--max-num-batched-tokens must be at least --max-num-seqs")
    operations = _make_operations(settings, communicator.shard.cut(config), device, dtype)
    if not isinstance(operations, TorchOperations) and settings.all_reduce == "auto" and communicator.shard.size > 1:
        from tandem_worker.ranks.peer_memory import connect_peers

        communicator.peer_all_reduce = connect_peers(
            communicator, num_ranks_here, settings.max_num_batched_tokens, config.hidden_size, device
        )
    model, loaded = _load_model(folder, config, operations, wanted_len, device, dtype, communicator)
    info = WorkerInfo(
        protocol_version=PROTOCOL_VERSION,
        worker_instance_id=uuid.uuid4().hex,
        fingerprint=fingerprint_of(config, dtype, communicator.digests(loaded.digest, device)),
        model=model_name(settings),
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        vocab_size=config.vocab_size,
        max_model_len=wanted_len,
        num_blocks=0,
        block_size=settings.block_size,
        max_num_rows=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        eos_token_ids=defaults.eos_token_ids,
        default_temperature=defaults.temperature,
        default_top_k=defaults.top_k,
        default_top_p=defaults.top_p,
        default_min_p=defaults.min_p,
        tokenizer_digest=tokenizer_digest(folder),
    )
    shape = kv_cache.shape_of(model.local_config, settings.block_size, dtype)
    num_blocks = settings.num_blocks or _measure_blocks(settings, model, shape, device, info)
    num_blocks = communicator.smallest(num_blocks, device)
    max_model_len = kv_cache.cut_context(wanted_len, num_blocks, settings.block_size)
    info = replace(info, num_blocks=num_blocks, max_model_len=max_model_len)
    logger.info(
        "%s, %s on %s: read %.1f MiB of weights; %d KV blocks of %d tokens, context %d",
        info.model, info.dtype, info.device, loaded.num_bytes / 2**20,
        num_blocks - 1, settings.block_size, max_model_len,
    )  # fmt: skip
    return make_runner(model, kv_cache.allocate(num_blocks, shape, device), info, use_graphs=not settings.enforce_eager)


def check_model(settings: WorkerSettings) -> None:
    """Raises ModelError or ConfigError where --tp-size ranks can't share the model; build_runner trusts that."""
    Shard(0, settings.tp_size).check(read_model_config(resolve_model(settings.model, ALL_FILES)))


def make_runner(model: Qwen3, cache: torch.Tensor, info: WorkerInfo, *, use_graphs: bool) -> Runner:
    """The fast runner for operations that are, the plain one for plain torch."""
    batch = Batch(
        num_rows=info.max_num_rows,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_model_len=info.max_model_len,
        max_num_batched_tokens=info.max_num_batched_tokens,
        vocab_size=info.vocab_size,
    )
    if isinstance(model.operations, TorchOperations):
        return TorchRunner(model, cache, batch, info)
    from tandem_worker.runners.cuda_runner import CudaRunner

    return CudaRunner(model, cache, batch, info, use_graphs=use_graphs)


def device_of(settings: WorkerSettings) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: torch finds no GPU")
    return torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")


def _dtype_of(settings: WorkerSettings) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device_of(settings).type == "cuda" else torch.float32
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]


def _make_operations(
    settings: WorkerSettings, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Operations:
    """Triton kernels where they can run, else plain torch, which serves any device, type and shape."""
    if device.type == "cpu" or settings.kernels == "torch":
        return TorchOperations()
    if problem := _why_no_kernels(settings, config, device, dtype):
        if settings.kernels == "triton":
            raise ConfigError(f"--kernels triton: {problem}")
        logger.warning("plain torch instead of the fast kernels: %s", problem)
        return TorchOperations()
    from tandem_worker.layers.triton_operations import TritonOperations

    return TritonOperations(
        settings.max_num_seqs, config.num_attention_heads, config.num_key_value_heads, config.head_dim, device
    )


def _why_no_kernels(
    settings: WorkerSettings, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, not {dtype}"
    if config.head_dim not in (32, 64, 128):
        return f"head_dim {config.head_dim} is not 32, 64 or 128"
    inner = config.num_attention_heads * config.head_dim
    if any(width % 64 for width in (config.hidden_size, config.intermediate_size, inner)):
        return "hidden_size, intermediate_size or the heads' size is no multiple of 64"
    return None


def _load_model(
    folder: Path,
    config: ModelConfig,
    operations: Operations,
    num_positions: int,
    device: torch.device,
    dtype: torch.dtype,
    communicator: Communicator,
) -> tuple[Qwen3, Loaded]:
    """The model with this rank's weights, and what was read."""
    try:
        with device:
            model = Qwen3(config, operations, num_positions, dtype, communicator)
    except RuntimeError as error:
        # A CPU's allocator raises a plain one, known by its text alone.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise ModelError(f"{folder / 'config.json'}: too little memory for a model of these sizes: {error}") from error
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else None
    return model, load_weights(folder, model.checkpoint_targets(), tied)


def _measure_blocks(
    settings: WorkerSettings, model: Qwen3, shape: kv_cache.KVCacheShape, device: torch.device, info: WorkerInfo
) -> int:
    """Blocks that fit beside the weights and the largest step; on a CPU, in the memory that the settings allow."""
    if device.type == "cpu":
        return kv_cache.num_blocks_within(int(settings.kv_cache_memory_gib * 2**30), shape)
    plan = _largest_step(info)
    num_blocks = int(plan.added_rows[-1].block_ids[-1]) + 1
    torch.cuda.empty_cache()
    cache = kv_cache.allocate(num_blocks, shape, device)
    runner = make_runner(model, cache, replace(info, num_blocks=num_blocks), use_graphs=not settings.enforce_eager)
    runner.execute(plan).wait()
    free, total = torch.cuda.mem_get_info(device)
    # With what torch and the graphs keep for the next time, which nothing else can have.
    used = total - free - cache.nbytes
    del runner, cache
    # A runner and its graphs refer to each other.
    gc.collect()
    torch.cuda.empty_cache()
    return kv_cache.num_blocks_within(int(total * settings.gpu_memory_utilization) - used, shape)


def _largest_step(info: WorkerInfo) -> StepPlan:
    """Prompts that fill the token budget, spread over all rows that it has room for, all sampled from."""
    num_rows = min(info.max_num_rows, info.max_num_batched_tokens)
    # Prompts as long as can be, for attention's memory, and one token for each other row, for the sampler's.
    lengths, room = [], info.max_num_batched_tokens - num_rows
    for _ in range(num_rows):
        length = 1 + min(room, info.max_model_len - 1)
        lengths.append(length)
        room -= length - 1
    num_blocks = [-(-length // info.block_size) for length in lengths]
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
                sampling=RowSampling(top_p=0.95, num_logprobs=MAX_LOGPROBS),
            )
            for row, (length, count, end) in enumerate(zip(lengths, num_blocks, ends.tolist(), strict=True))
        ),
        chunk_rows=np.arange(num_rows, dtype=np.int32),
        chunk_num_tokens=np.array(lengths, np.int32),
    )
