"""Small random Qwen3 checkpoints, made by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

DEFAULTS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # The initialisation is wide, so that greedy outputs don't fall into loops.
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def save_random_model(
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    save_original_format: bool = True,
    **config: Any,
) -> Path:
    """Saves a checkpoint whose config is DEFAULTS changed by `config`; gives its folder.

    With num_experts in the config it is a mixture of experts; without save_original_format its experts are fused. The
    weights of norms are random too, so that a wrong one shows.
    """
    torch.manual_seed(seed)
    config = {**DEFAULTS, **config}
    if "num_experts" in config:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, architectures=["Qwen3MoeForCausalLM"]))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**config, architectures=["Qwen3ForCausalLM"]))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.generation_config = GenerationConfig()
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=save_original_format
    )
    return folder
