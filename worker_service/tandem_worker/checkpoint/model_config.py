"""What config.json says of a Qwen3 model, checked. Knows no torch.

A key that is left out has the default of transformers' Qwen3Config or Qwen3MoeConfig; sizes and rope_theta must be
given.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tandem_worker.checkpoint.config_file import MAX_SIZE, ConfigFile, brief

DENSE, MOE = ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
DENSE_HEAD_DIM = 128


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): how rotary frequencies stretch to a longer context."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts' shape: which layers have it in the MLP's place, and what it is there."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen3's shape. Names are config.json's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    yarn: YarnScaling | None = None
    moe: MoEConfig | None = None

    @property
    def context(self) -> int:
        """The longest context that the model knows, in tokens; YaRN may stretch max_position_embeddings."""
        if self.yarn is None:
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.yarn.factor * self.yarn.original_max_position_embeddings))


def read_model_config(folder: Path) -> ModelConfig:
    """Raises ModelError, naming file and key, where the model is not one that Tandem runs."""
    file = ConfigFile(folder / "config.json")
    architecture = _read_architecture(file)
    _refuse_what_is_not_supported(file)
    num_heads, num_kv_heads, head_dim = _read_heads(file, architecture)
    rope = _rope_of(file)
    max_position_embeddings = file.whole("max_position_embeddings")
    return ModelConfig(
        vocab_size=file.whole("vocab_size"),
        hidden_size=file.whole("hidden_size"),
        intermediate_size=file.whole("intermediate_size"),
        num_hidden_layers=file.whole("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=file.number("rms_norm_eps", 1e-6, maximum=1.0),
        rope_theta=rope.number("rope_theta", minimum=1.01),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=file.flag("tie_word_embeddings", False),
        yarn=_read_yarn(rope, max_position_embeddings),
        moe=_read_moe(file) if architecture == MOE else None,
    )


def _read_architecture(file: ConfigFile) -> str:
    architectures = file.typed("architectures", list)
    for architecture in ARCHITECTURES:
        if architecture in architectures:
            return architecture
    raise file.fail("architectures", f"{brief(architectures)} is not supported; {' and '.join(ARCHITECTURES)} are")


def _refuse_what_is_not_supported(file: ConfigFile) -> None:
    for key in ("quantization_config", "compression_config"):
        if quantization := file.values.get(key):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            method = method[:100] if isinstance(method, str) and method.isprintable() else "quantisation"
            raise file.fail(key, f"{method} is not supported yet")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        if file.values.get(key, wanted) != wanted:
            raise file.fail(key, f"{brief(file.values[key])} is not supported; {wanted!r} is")
    kinds = file.typed("layer_types", list)
    if any(kind != "full_attention" for kind in kinds):
        raise file.fail("layer_types", f"{brief(kinds)} are not supported; full_attention is")


def _read_heads(file: ConfigFile, architecture: str) -> tuple[int, int, int]:
    """num_attention_heads, num_key_value_heads, head_dim."""
    num_heads = file.whole("num_attention_heads")
    default_kv_heads = {DENSE: 32, MOE: 4}[architecture]
    if "num_key_value_heads" in file.values:
        default_kv_heads = num_heads
    num_kv_heads = file.whole("num_key_value_heads", default_kv_heads)
    if num_heads % num_kv_heads:
        raise file.fail("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, {num_heads}")
    default_head_dim = DENSE_HEAD_DIM
    if architecture == MOE:
        # Qwen3MoeConfig has no head_dim; its attention falls back on this.
        default_head_dim = file.whole("hidden_size") // num_heads
    head_dim = file.whole("head_dim", default_head_dim)
    if head_dim % 2:
        raise file.fail("head_dim", f"must be even, is {head_dim}")
    return num_heads, num_kv_heads, head_dim


def _rope_of(file: ConfigFile) -> ConfigFile:
    """transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.

    Of both, rope_scaling counts, as in transformers: it is what recipes for YaRN tell people to add.
    """
    scaling, parameters = file.typed("rope_scaling", dict), file.typed("rope_parameters", dict)
    shared = {key: file.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if "rope_theta" in parameters:
        shared["rope_theta"] = parameters["rope_theta"]
    return file.part({**shared, **(scaling or parameters)})


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


def _read_yarn(rope: ConfigFile, max_position_embeddings: int) -> YarnScaling | None:
    if (partial := rope.values.get("partial_rotary_factor")) not in (None, 1):
        raise rope.fail("partial_rotary_factor", f"{brief(partial)} is not supported; 1 is")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise rope.fail("rope_type", f"{brief(kind)} is not supported; 'default' and 'yarn' are")
    original = rope.whole("original_max_position_embeddings", max_position_embeddings)
    # A context of more than MAX_SIZE has positions that float32 cannot tell apart.
    factor = rope.number("factor", max_position_embeddings / original, minimum=1.0, maximum=MAX_SIZE / original)
    attention_factor = _mscale(factor, 1.0)
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        mscale, mscale_all_dim = (rope.number(key, maximum=1e3) for key in ("mscale", "mscale_all_dim"))
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    beta_slow = rope.number("beta_slow", 1, minimum=1e-3, maximum=1e6)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", attention_factor, minimum=1e-3, maximum=1e3),
        beta_fast=rope.number("beta_fast", 32, minimum=beta_slow, maximum=1e6),
        beta_slow=beta_slow,
        truncate=rope.flag("truncate", True),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
