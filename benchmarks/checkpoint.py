"""Writes a Qwen3 checkpoint with random weights (bf16 safetensors) of a named size.

Usage: python -m benchmarks.checkpoint SIZE OUT_DIR [TOKENIZER_JSON]

SIZE is a key of SIZES. TOKENIZER_JSON is a real Qwen3's tokenizer.json, or the folder it is in; 'tiny' takes the
embedded model's if none is given, and is made without a GPU. Speed does not depend on the weights' values, so timings
hold for the real checkpoint.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tandem_shared.model_folder import EMBEDDED_MODEL, TOKENIZER_FILES, resolve_model

QWEN3 = {
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SIZES: dict[str, dict[str, Any]] = {
    "0.6b": {
        **QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "8b": {
        **QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "32b": {
        **QWEN3,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 25600,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
        "rope_theta": 10000,
        "eos_token_id": 0,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "tie_word_embeddings": False,
    },
}
WEIGHT_STD = 0.02
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": WEIGHT_STD,
    "max_window_layers": 28,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# Qwen3's defaults, which apply to requests that leave sampling out.
SAMPLING_DEFAULTS = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write_checkpoint(size: str, folder: Path, tokenizer_json: Path) -> None:
    """Writes the checkpoint. config.json is written last, so a folder that has one is complete."""
    config = {**COMMON, **SIZES[size]}
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_json, folder / "tokenizer.json")
    weights = random_weights(config, "cpu" if size == "tiny" else "cuda")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eos_token_ids = [config["eos_token_id"], *([config["bos_token_id"]] if "bos_token_id" in config else [])]
    generation = {"eos_token_id": eos_token_ids, **SAMPLING_DEFAULTS}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def random_weights(config: dict[str, Any], device: str) -> dict[str, torch.Tensor]:
    """Normal weights of standard deviation WEIGHT_STD; those of norms are 1. Drawn on `device`, returned on the CPU."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        weight = torch.randn(*shape, generator=generator, device=device) * WEIGHT_STD
        return weight.bfloat16().cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden), "model.norm.weight": ones(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": normal(heads, hidden),
            "self_attn.k_proj": normal(kv_heads, hidden),
            "self_attn.v_proj": normal(kv_heads, hidden),
            "self_attn.o_proj": normal(hidden, heads),
            "self_attn.q_norm": ones(head_dim),
            "self_attn.k_norm": ones(head_dim),
            "mlp.gate_proj": normal(intermediate, hidden),
            "mlp.up_proj": normal(intermediate, hidden),
            "mlp.down_proj": normal(hidden, intermediate),
            "input_layernorm": ones(hidden),
            "post_attention_layernorm": ones(hidden),
        }
        weights |= {f"model.layers.{index}.{name}.weight": weight for name, weight in layer.items()}
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("tokenizer", type=Path, nargs="?", metavar="TOKENIZER_JSON")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer
    if tokenizer is None and arguments.size == "tiny":
        tokenizer = resolve_model(EMBEDDED_MODEL, TOKENIZER_FILES)
    if tokenizer is None:
        parser.error("give the tokenizer.json of a Qwen3 (make: TOKENIZER=...)")
    if tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        parser.error(f"no file {tokenizer}")
    write_checkpoint(arguments.size, arguments.folder, tokenizer)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
