"""config.json: what is read of it, and what is refused by file and key."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem_shared.errors import ModelError
from tandem_worker.models.registry import read_model_config
from tests.unit.shared.test_model_folder import SPECIAL, make_special

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
}
MOE: dict[str, Any] = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""Qwen's own recipe for a longer context."""


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("rope", "max_position_embeddings", "context"),
    [
        ({}, 40960, 40960),
        ({"rope_scaling": YARN}, 40960, 131072),
        ({"rope_scaling": YARN}, 131072, 131072),
        ({"rope_scaling": YARN}, 262144, 262144),
        ({"rope_parameters": {**YARN, "rope_theta": 1e6}}, 40960, 131072),
        # Without an original length, max_position_embeddings is that; without a factor, it is the stretched length.
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 40960, 81920),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32768}}, 65536, 65536),
        # A folder saved by transformers 5, to which someone added the recipe.
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 40960, 131072),
    ],
)
def test_the_context_is_the_longer_of_the_models_own_and_yarns(
    rope: dict[str, Any], max_position_embeddings: int, context: int, tmp_path: Path
) -> None:
    config = CONFIG | {"max_position_embeddings": max_position_embeddings, **rope}
    read = read_model_config(write_config(tmp_path, **config))
    assert read.context == context
    assert read.rope_theta == 1e6


@pytest.mark.parametrize(
    ("config", "left_out", "expected"),
    [
        # As in transformers: Qwen3Config has defaults; Qwen3MoeConfig has no head_dim, and its model divides.
        (CONFIG, [], {"head_dim": 128, "num_key_value_heads": 2}),
        (CONFIG | {"head_dim": 16}, [], {"head_dim": 16}),
        (CONFIG | {"num_attention_heads": 64}, ["num_key_value_heads"], {"num_key_value_heads": 32}),
        (CONFIG | {"num_key_value_heads": None}, [], {"num_key_value_heads": 4}),
        (MOE, [], {"head_dim": 16}),
        (MOE | {"num_attention_heads": 32}, ["num_key_value_heads"], {"num_key_value_heads": 4, "head_dim": 2}),
    ],
)
def test_what_is_left_out_is_what_transformers_takes(
    config: dict[str, Any], left_out: list[str], expected: dict[str, int], tmp_path: Path
) -> None:
    folder = write_config(tmp_path, **{key: value for key, value in config.items() if key not in left_out})
    read = read_model_config(folder)
    assert {key: getattr(read, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": [["Qwen3ForCausalLM"]]}, "architectures: .* is not supported"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures: must be a list"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures: .*Qwen2ForCausalLM.* is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: fp8 is not supported yet"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: awq is not supported yet"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantisation is not supported yet"),
        ({"quantization_config": [1]}, "quantization_config: quantisation is not supported yet"),
        ({"vocab_size": 10**400}, "vocab_size: must be "),
        ({"vocab_size": -1}, "vocab_size: must be a positive number"),
        ({"vocab_size": True}, "vocab_size: must be a positive number"),
        ({"hidden_size": 2**63}, "hidden_size: must be "),
        ({"hidden_size": 64.5}, "hidden_size: must be a whole number"),
        ({"hidden_size": float("inf")}, "hidden_size: must be "),
        ({"hidden_size": float("nan")}, "hidden_size: must be a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be "),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings: must be "),
        ({"head_dim": 15}, "head_dim: must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: must be true or false"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps: must be "),
        ({"rope_theta": 1e308}, "rope_theta: must be "),
        ({"rope_theta": 1}, "rope_theta: must be "),
        ({"rope_scaling": [1]}, "rope_scaling: must be a dict"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type: .* is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not"),
        ({"rope_scaling": YARN | {"factor": 1e300}}, "factor: must be "),
        ({"rope_scaling": YARN | {"factor": 1e-300}}, "factor: must be "),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "factor: must be "),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 1e300}}, "original_max_position_embeddings: "),
        ({"rope_scaling": YARN | {"attention_factor": 1e308}}, "attention_factor: must be "),
        ({"rope_scaling": YARN | {"beta_slow": 1e-300}}, "beta_slow: must be "),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_fast: must be "),
        ({"rope_scaling": YARN | {"mscale": 1e308, "mscale_all_dim": 1}}, "mscale: must be "),
        ({"rope_scaling": YARN | {"truncate": "yes"}}, "truncate: must be true or false"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: .* are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_file_and_key(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {problem}") as caught:
        read_model_config(write_config(tmp_path, **CONFIG | changes))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts": 10**9}, "num_experts: must be "),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 is more than num_experts, 8"),
        ({"mlp_only_layers": [[0]]}, "mlp_only_layers: must be whole numbers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: must be true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: must be a positive number"),
    ],
)
def test_a_mixture_of_experts_is_refused_by_file_and_key(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {problem}"):
        read_model_config(write_config(tmp_path, **MOE | changes))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (nested(100_000), "is nested too deeply"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", "holds no JSON object"),
        ("{", "Expecting"),
        ("", "Expecting value"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "integer string conversion"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"\xf0", "codec can't decode"),
    ],
)
def test_what_is_no_json_object_is_refused_by_its_file(text: str | bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=rf"config\.json: .*{problem}"):
        read_model_config(tmp_path)


def test_a_huge_file_is_refused_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match=r"config\.json: is larger than"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.timeout(10)
def test_only_a_regular_file_is_opened(kind: str, tmp_path: Path) -> None:
    make_special(tmp_path / "config.json", kind)
    with pytest.raises(ModelError, match=r"config\.json: is not a regular file"):
        read_model_config(tmp_path)
