"""A decoder's shape as config.json gives it, checked, and how the keys that families share are read. Knows no torch."""

import math
from dataclasses import dataclass

from tandem_worker.checkpoint.config_file import MAX_SIZE, ConfigFile, brief

MAX_LAYERS = 1024


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
    """The shape of a mixture of experts."""

    layers: tuple[int, ...]
    """The layers that have it in the MLP's place"""
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape. Names are config.json's. A family that needs more can derive its own."""

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


def read_decoder_config(
    file: ConfigFile, *, default_num_kv_heads: int, default_head_dim: int, moe: MoEConfig | None = None
) -> ModelConfig:
    """A config of keys that decoders with rotary embeddings share; sizes and rope_theta must be given. The defaults are
    the family's, for keys that are left out. Raises ModelError, naming file and key.
    """
    _refuse_unsupported(file)
    num_heads, num_kv_heads, head_dim = _read_heads(file, default_num_kv_heads, default_head_dim)
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
        moe=moe,
    )


def _refuse_unsupported(file: ConfigFile) -> None:
    """Raises ModelError where the config asks for what no family has here."""
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


def _read_heads(file: ConfigFile, default_num_kv_heads: int, default_head_dim: int) -> tuple[int, int, int]:
    """num_attention_heads, num_key_value_heads, head_dim."""
    num_heads = file.whole("num_attention_heads")
    # As in transformers, null means one KV head for each query head.
    default = num_heads if "num_key_value_heads" in file.values else default_num_kv_heads
    num_kv_heads = file.whole("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise file.fail("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, {num_heads}")
    head_dim = file.whole("head_dim", default_head_dim)
    if head_dim % 2:
        raise file.fail("head_dim", f"must be even, is {head_dim}")
    return num_heads, num_kv_heads, head_dim


def _rope_of(file: ConfigFile) -> ConfigFile:
    """A reader of the rotary embedding's keys: transformers 5 writes rope_parameters, 4 wrote rope_theta and
    rope_scaling.

    Where there are both, rope_scaling counts, as in transformers: it is what recipes for YaRN tell people to add.
    """
    scaling, parameters = file.typed("rope_scaling", dict), file.typed("rope_parameters", dict)
    shared = {key: file.values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if "rope_theta" in parameters:
        shared["rope_theta"] = parameters["rope_theta"]
    return file.part({**shared, **(scaling or parameters)})


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
    """YaRN's factor of attention, as its paper gives it for a factor of length."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
