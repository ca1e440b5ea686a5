"""From settings to a runner: reads the config, loads the model, sizes and allocates its KV pool."""

import logging
import os
import uuid
from dataclasses import replace
from pathlib import Path

import torch

from tandem_shared.config import WorkerSettings, model_name
from tandem_shared.errors import ConfigError, ModelError
from tandem_shared.host.progress import Progress
from tandem_shared.model_folder import ALL_FILES, resolve_model, tokenizer_digest
from tandem_shared.step_codec import PROTOCOL_VERSION
from tandem_shared.step_plan import WorkerInfo
from tandem_shared.structured_output import GrammarError, load_compiler
from tandem_worker.attention import choice
from tandem_worker.checkpoint.generation_config import read_generation_defaults
from tandem_worker.checkpoint.model_config import ModelConfig
from tandem_worker.checkpoint.weights import fingerprint_of, load_weights
from tandem_worker.device import device_of, dtype_of
from tandem_worker.layers.operations import Operations, TorchOperations
from tandem_worker.models.model import Model
from tandem_worker.models.registry import Architecture, read_architecture, read_model_config
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.ranks.shard import Shard
from tandem_worker.runners import kv_cache
from tandem_worker.runners.grammar_rows import GrammarRows, num_mask_threads
from tandem_worker.runners.make_runner import make_runner
from tandem_worker.runners.memory import measure_blocks
from tandem_worker.runners.runner import Runner

logger = logging.getLogger(__name__)


@torch.inference_mode()
def build_runner(settings: WorkerSettings, communicator: Communicator | None = None) -> Runner:
    """Loads a rank's part of a model and makes it ready to run. Raises ModelError and ConfigError.

    communicator: the rank's; without one the model is loaded whole.
    """
    communicator = communicator or Communicator()
    folder = resolve_model(settings.model, ALL_FILES, settings.revision)
    device, dtype = device_of(settings), dtype_of(settings)
    # The ranks of one host share its CPUs. A launcher that does not tell their number is taken
    # to have started one on each host.
    num_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(settings.num_threads or max(1, torch.get_num_threads() // num_ranks_here))
    architecture, config = read_architecture(folder)
    max_model_len = _max_model_len(settings, config)
    defaults = read_generation_defaults(folder, config.vocab_size)
    for warning in defaults.warnings if communicator.shard.rank == 0 else ():
        logger.warning("%s", warning)
    local_config = communicator.shard.cut(config)
    operations = _make_operations(settings, local_config, device, dtype)
    if not isinstance(operations, TorchOperations) and settings.all_reduce == "auto" and communicator.shard.size > 1:
        from tandem_worker.ranks.peer_memory import connect_peers

        communicator.peer_all_reduce = connect_peers(
            communicator, num_ranks_here, settings.max_num_batched_tokens, config.hidden_size, device
        )
    with Progress("making the model"):
        model = _make_model(architecture, folder, config, operations, max_model_len, device, dtype, communicator)
    logger.info("reading the weights in %s", folder)
    targets = model.checkpoint_targets()
    with Progress("reading the weights", len(targets), "tensors") as progress:
        loaded = load_weights(folder, targets, model.tied_weights, progress.advance)
    info = WorkerInfo(
        protocol_version=PROTOCOL_VERSION,
        worker_instance_id=uuid.uuid4().hex,
        fingerprint=fingerprint_of(config, dtype, communicator.digests(loaded.digest, device)),
        model=model_name(settings),
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        num_blocks=0,
        block_size=settings.block_size,
        max_num_rows=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        eos_token_ids=defaults.eos_token_ids,
        sampling_defaults=defaults.sampling,
        tokenizer_digest=tokenizer_digest(folder),
    )
    with Progress("measuring the largest step, and making the KV pool"):
        info, cache = _allocate_cache(settings, model, local_config, info, device, dtype)
    logger.info(
        "%s, %s on %s: read %.1f MiB of weights; %d KV blocks of %d tokens, context %d",
        info.model, info.dtype, info.device, loaded.num_bytes / 2**20,
        info.num_blocks - 1, info.block_size, info.max_model_len,
    )  # fmt: skip
    with Progress("reading the vocabulary"):
        grammars = _make_grammars(folder, info, num_ranks_here)
    return make_runner(model, cache, info, grammars, use_graphs=not settings.enforce_eager)


def check_model(settings: WorkerSettings) -> None:
    """Raises ModelError or ConfigError where --tp-size ranks can't divide the model. build_runner does not check it."""
    folder = resolve_model(settings.model, ALL_FILES, settings.revision)
    Shard(0, settings.tp_size).check(read_model_config(folder))


def _max_model_len(settings: WorkerSettings, config: ModelConfig) -> int:
    """The longest context that is wanted, in tokens. Raises ConfigError where the settings do not fit the model."""
    max_model_len = settings.max_model_len or config.context
    if max_model_len > config.context:
        raise ConfigError(f"--max-model-len {max_model_len}: the model's context is {config.context}")
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise ConfigError("--max-num-batched-tokens must be at least --max-num-seqs")
    return max_model_len


def _make_operations(
    settings: WorkerSettings, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Operations:
    """What the layers are computed with, as the attention backend decides it. config is the rank's own."""
    name = choice.choose(settings.attention_backend, choice.conditions_of(settings, config, device, dtype))
    logger.info("attention backend %s", name)
    if name == choice.TORCH:
        return TorchOperations()
    from tandem_worker.layers.triton_operations import TritonOperations

    return TritonOperations(choice.make_attention(name, settings, config, device))


def _make_model(
    architecture: Architecture,
    folder: Path,
    config: ModelConfig,
    operations: Operations,
    num_positions: int,
    device: torch.device,
    dtype: torch.dtype,
    communicator: Communicator,
) -> Model:
    """The rank's part of the model, uninitialised. Raises ModelError where there is too little memory for it."""
    try:
        with device:
            return architecture.make(config, operations, num_positions, dtype, communicator)
    except RuntimeError as error:
        # A CPU's allocator raises a RuntimeError, known by its text alone.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise ModelError(f"{folder / 'config.json'}: too little memory for a model of these sizes: {error}") from error


def _make_grammars(folder: Path, info: WorkerInfo, num_ranks_here: int) -> GrammarRows:
    """The vocabulary is read here and not with the first grammar, because no other thread runs meanwhile."""
    try:
        compiler = load_compiler(folder, info.vocab_size, info.eos_token_ids)
    except GrammarError as error:
        logger.info("no structured output: %s", error)
        compiler = None
    return GrammarRows(compiler, info.vocab_size, info.eos_token_ids, num_mask_threads(num_ranks_here))


def _allocate_cache(
    settings: WorkerSettings,
    model: Model,
    local_config: ModelConfig,
    info: WorkerInfo,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[WorkerInfo, torch.Tensor]:
    """The KV pool, as large on every rank, and `info` with the number of its blocks and the context that it holds."""
    shape = kv_cache.shape_of(local_config, settings.block_size, dtype)
    num_blocks = settings.num_blocks or measure_blocks(settings, model, shape, device, info)
    num_blocks = model.communicator.smallest(num_blocks, device)
    max_model_len = kv_cache.cut_context(info.max_model_len, num_blocks, settings.block_size)
    info = replace(info, num_blocks=num_blocks, max_model_len=max_model_len)
    return info, kv_cache.allocate(num_blocks, shape, device)
