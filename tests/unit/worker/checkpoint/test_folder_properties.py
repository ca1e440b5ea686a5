"""Whatever stands in the JSON files of a model folder, reading them gives a value or a ModelError, nothing else."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_shared.errors import ModelError
from tandem_worker.checkpoint.generation_config import IGNORED, read_generation_defaults
from tandem_worker.layers.rotary import build_rotary_table
from tandem_worker.models.registry import read_model_config
from tests.support.tokenizers import EMBEDDED
from tests.unit.worker.checkpoint.test_model_config import CONFIG, MOE, YARN

EXTREMES = [
    None, True, False, 0, -1, 1, 2, 127, 2**24, 2**24 + 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0,
    1e-300, 1e300, 1.0000001, math.inf, -math.inf, math.nan, "", "yarn", "default", "a", "\ud800", "\0", [], {}, [[]],
    [{}], [0], [None], {"a": {"a": {}}}, {"content": "a"}, {"quant_method": []}, "x" * 3000,
]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(EXTREMES) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = [
    *YARN, "type", "rope_theta", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor",
]  # fmt: skip
CONFIG_KEYS = [
    *MOE, "head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "use_sliding_window",
    "layer_types", "rope_scaling", "rope_parameters", "mlp_only_layers", "decoder_sparse_step", "num_local_experts",
    "norm_topk_prob", "quantization_config", "eos_token_id",
]  # fmt: skip
GENERATION_KEYS = [*IGNORED, "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"]


def changes(keys: list[str], max_size: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys), VALUES, max_size=max_size)


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@contextmanager
def only_model_errors(folder: Path) -> Iterator[None]:
    """Lets a ModelError pass that names a file of the folder, and is short however long the bad value is."""
    try:
        yield
    except ModelError as error:
        assert str(error).startswith(f"{folder}/")
        assert len(str(error)) < 1000 + len(str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@settings(deadline=None, max_examples=100)
@given(base=st.sampled_from([CONFIG, MOE]), changed=changes(CONFIG_KEYS), rope=changes(ROPE_KEYS, 4))
@example(CONFIG, {"architectures": [["Qwen3ForCausalLM"]]}, {})
@example(CONFIG, {"vocab_size": 10**400}, {})
@example(CONFIG, {}, {"attention_factor": 1e308})
def test_config(folder: Path, base: dict[str, Any], changed: dict[str, Any], rope: dict[str, Any]) -> None:
    write(folder, config={**base, "rope_scaling": {**YARN, **rope}, **changed})
    with only_model_errors(folder):
        config = read_model_config(folder)
        if config.head_dim <= 1024:
            # Values that are within their limits give finite angles.
            assert build_rotary_table(config, 16, torch.float32).isfinite().all()


@settings(deadline=None, max_examples=100)
@given(
    generation=changes(GENERATION_KEYS, 5) | VALUES,
    config=changes(["eos_token_id"]),
    tokenizer_config=changes(["eos_token", "added_tokens_decoder"]) | VALUES,
    tokenizer=changes(["added_tokens", "model"]) | VALUES,
)
@example({"eos_token_id": [[1]]}, {}, {}, {})
@example({}, {}, {"eos_token": "a", "added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, {})
@example({}, {}, {"eos_token": "a"}, {"model": {"vocab": {"a": [10**400]}}})
def test_generation_config_and_eos(
    folder: Path, generation: Any, config: dict[str, Any], tokenizer_config: Any, tokenizer: Any
) -> None:
    write(folder, generation_config=generation, config=config, tokenizer_config=tokenizer_config, tokenizer=tokenizer)
    with only_model_errors(folder):
        defaults = read_generation_defaults(folder, 256)
        assert all(0 <= token_id < 256 for token_id in defaults.eos_token_ids)
        assert all(len(warning) < 3000 + len(str(folder)) for warning in defaults.warnings)


TOKENIZER = json.loads(EMBEDDED.read_text())


@settings(deadline=None, max_examples=30)
@given(changed=changes([key for key in TOKENIZER if key != "model"]), model=changes(list(TOKENIZER["model"])))
def test_tokenizer(changed: dict[str, Any], model: dict[str, Any], folder: Path) -> None:
    # The vocabulary is small, for speed. Merges of tokens outside it would be an error of their own.
    small = {**TOKENIZER["model"], "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    write(folder, tokenizer={**TOKENIZER, "model": {**small, **model}, **changed})
    with only_model_errors(folder):
        load_tokenizer(folder)


@settings(deadline=None, max_examples=50)
@given(contents=st.binary(max_size=50) | st.text(alphabet='{}[]",:0e-\\u', max_size=50).map(str.encode))
def test_any_bytes(contents: bytes, folder: Path) -> None:
    for name, read in (("config", read_model_config), ("tokenizer", load_tokenizer)):
        (folder / f"{name}.json").write_bytes(contents)
        with only_model_errors(folder):
            read(folder)
