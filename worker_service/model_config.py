"""What config.json and generation_config.json say of a Qwen3 model, checked. Knows no torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ModelError

T = TypeVar("T", list[Any], dict[str, Any])

DENSE, MOE = ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


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


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json's sampling defaults, None where it has none."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


class _Reader:
    """Reads keys of one JSON file; errors name the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error
        if not isinstance(self.values, dict):
            raise ModelError(f"{path}: holds no JSON object")

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {key}: {problem}")

    def number(self, key: str, default: float | None = None, values: dict[str, Any] | None = None) -> float:
        value = (self.values if values is None else values).get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
            raise self.fail(key, f"must be a positive number, is {value!r}")
        return value

    def typed(self, key: str, kind: type[T], values: dict[str, Any] | None = None) -> T:
        """The key's list or object; an empty one where it is missing or null."""
        value = (self.values if values is None else values).get(key)
        value = kind() if value is None else value
        if not isinstance(value, kind):
            raise self.fail(key, f"must be a {kind.__name__}, is {value!r}")
        return value

    def whole(self, key: str, default: int | None = None, values: dict[str, Any] | None = None) -> int:
        value = self.number(key, default, values)
        if value != int(value):
            raise self.fail(key, f"must be a whole number, is {value!r}")
        return int(value)


def read_model_config(folder: Path) -> ModelConfig:
    """Raises ModelError, naming file and key, where the model is not one that Tandem runs."""
    reader = _Reader(folder / "config.json")
    architectures = reader.typed("architectures", list)
    if not set(architectures) & set(ARCHITECTURES):
        raise reader.fail("architectures", f"{architectures} is not supported; {' and '.join(ARCHITECTURES)} are")
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("use_sliding_window", False)):
        if reader.values.get(key, wanted) != wanted:
            raise reader.fail(key, f"{reader.values[key]!r} is not supported; {wanted!r} is")
    kinds = reader.typed("layer_types", list)
    if any(kind != "full_attention" for kind in kinds):
        raise reader.fail("layer_types", f"{kinds} are not supported; full_attention is")
    num_heads = reader.whole("num_attention_heads")
    num_kv_heads = reader.whole("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise reader.fail("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads, {num_heads}")
    hidden_size = reader.whole("hidden_size")
    head_dim = reader.whole("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise reader.fail("head_dim", f"must be even, is {head_dim}")
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    rope = {**reader.typed("rope_scaling", dict), **reader.typed("rope_parameters", dict)}
    rope_theta = reader.number("rope_theta", values={**reader.values, **rope})
    if rope_theta <= 1:
        raise reader.fail("rope_theta", f"must be above 1, is {rope_theta}")
    max_position_embeddings = reader.whole("max_position_embeddings")
    return ModelConfig(
        vocab_size=reader.whole("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.whole("intermediate_size"),
        num_hidden_layers=reader.whole("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=bool(reader.values.get("tie_word_embeddings", False)),
        yarn=_read_yarn(reader, rope, max_position_embeddings),
        moe=_read_moe(reader) if MOE in architectures else None,
    )


def _read_moe(reader: _Reader) -> MoEConfig:
    dense_layers, step = reader.typed("mlp_only_layers", list), reader.whole("decoder_sparse_step", 1)
    # transformers 5 writes num_local_experts, 4 wrote num_experts.
    key = "num_local_experts" if "num_local_experts" in reader.values else "num_experts"
    num_experts, num_chosen = reader.whole(key), reader.whole("num_experts_per_tok")
    if num_chosen > num_experts:
        raise reader.fail("num_experts_per_tok", f"{num_chosen} is more than {key}, {num_experts}")
    layers = range(reader.whole("num_hidden_layers"))
    return MoEConfig(
        layers=tuple(layer for layer in layers if layer not in dense_layers and (layer + 1) % step == 0),
        num_experts=num_experts,
        num_experts_per_tok=num_chosen,
        moe_intermediate_size=reader.whole("moe_intermediate_size"),
        norm_topk_prob=bool(reader.values.get("norm_topk_prob", False)),
    )


def _read_yarn(reader: _Reader, rope: dict[str, Any], max_position_embeddings: int) -> YarnScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise reader.fail("rope_type", f"{kind!r} is not supported; 'default' and 'yarn' are")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise reader.fail("partial_rotary_factor", f"{rope['partial_rotary_factor']!r} is not supported; 1 is")
    original = reader.whole("original_max_position_embeddings", max_position_embeddings, rope)
    factor = reader.number("factor", max_position_embeddings / original, rope)
    attention_factor = _mscale(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, mscale_all_dim = reader.number("mscale", values=rope), reader.number("mscale_all_dim", values=rope)
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=reader.number("attention_factor", attention_factor, rope),
        beta_fast=reader.number("beta_fast", 32, rope),
        beta_slow=reader.number("beta_slow", 1, rope),
        truncate=bool(rope.get("truncate", True)),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def read_generation_defaults(folder: Path, vocab_size: int) -> GenerationDefaults:
    """What the model asks of requests that don't say; nothing where it has no generation_config.json."""
    path = folder / "generation_config.json"
    reader = _Reader(path if path.exists() else folder / "config.json")
    values = reader.values
    eos = values.get("eos_token_id")
    if eos is None and path.exists():
        # Older folders have it in config.json alone; without it nothing would ever stop.
        reader = _Reader(folder / "config.json")
        eos = reader.values.get("eos_token_id")
    eos_token_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    for token_id in eos_token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise reader.fail("eos_token_id", f"{token_id!r} is not in the vocabulary of {vocab_size}")
    if not path.exists():
        return GenerationDefaults(eos_token_ids)
    if values.get("do_sample") is False:
        return GenerationDefaults(eos_token_ids, temperature=0.0)
    # What the wire's float and uint32 hold, and what a row's sampling accepts.
    limits: dict[str, tuple[type, float, float]] = {
        "temperature": (float, 0, 3e38),
        "top_k": (int, 0, 2**32 - 1),
        "top_p": (float, 1e-30, 1),
        "min_p": (float, 0, 1),
    }
    for key, (kind, least, most) in limits.items():
        value = values.get(key)
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value <= most):
            raise _Reader(path).fail(key, f"{value!r} is out of range")
    return GenerationDefaults(eos_token_ids, **{key: values.get(key) for key in limits})
