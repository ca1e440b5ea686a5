"""What config.json says of a Qwen3 model. Knows no torch.

A key that is left out has the default of transformers' Qwen3Config or Qwen3MoeConfig; sizes and rope_theta must be
given. What is wrong is a ModelError that names file and key.
"""

from tandem_worker.checkpoint.config_file import ConfigFile, brief
from tandem_worker.checkpoint.model_config import MAX_LAYERS, ModelConfig, MoEConfig, read_decoder_config

MAX_EXPERTS = 4096


def read_qwen3_config(file: ConfigFile) -> ModelConfig:
    """The config of a Qwen3ForCausalLM."""
    return read_decoder_config(file, default_num_kv_heads=32, default_head_dim=128)


def read_qwen3_moe_config(file: ConfigFile) -> ModelConfig:
    """The config of a Qwen3MoeForCausalLM."""
    # Qwen3MoeConfig has no head_dim; its attention falls back on this.
    head_dim = file.whole("hidden_size") // file.whole("num_attention_heads")
    return read_decoder_config(file, default_num_kv_heads=4, default_head_dim=head_dim, moe=_read_moe(file))


def _read_moe(file: ConfigFile) -> MoEConfig:
    dense_layers, step = file.typed("mlp_only_layers", list), file.whole("decoder_sparse_step", 1)
    if not all(type(layer) is int for layer in dense_layers):
        raise file.fail("mlp_only_layers", f"must be whole numbers, is {brief(dense_layers)}")
    # transformers 5 writes num_local_experts, 4 wrote num_experts.
    key = "num_local_experts" if "num_local_experts" in file.values else "num_experts"
    num_experts, num_chosen = file.whole(key, maximum=MAX_EXPERTS), file.whole("num_experts_per_tok")
    if num_chosen > num_experts:
        raise file.fail("num_experts_per_tok", f"{num_chosen} is more than {key}, {num_experts}")
    layers = range(file.whole("num_hidden_layers", maximum=MAX_LAYERS))
    return MoEConfig(
        layers=tuple(layer for layer in layers if layer not in dense_layers and (layer + 1) % step == 0),
        num_experts=num_experts,
        num_experts_per_tok=num_chosen,
        moe_intermediate_size=file.whole("moe_intermediate_size"),
        norm_topk_prob=file.flag("norm_topk_prob", False),
    )
