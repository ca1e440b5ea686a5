"""From settings to a runner: what a folder asks reaches the runner, and what can't be served is refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks.teacher_forcing import teacher_forced_logits
from tandem_shared.errors import ConfigError, ModelError
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_exactness import make_runner


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_yarns_context_is_served(tmp_path: Path) -> None:
    """Qwen's recipe at a hundredth of its size: max_position_embeddings is not the stretched context."""
    folder = save_random_model(tmp_path, max_position_embeddings=400, initializer_range=0.1)
    change(folder, "config.json", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 320})
    assert make_runner(folder, num_blocks=100).info.max_model_len == 1280
    runner = make_runner(folder, num_blocks=100, max_model_len=1280)
    ids = np.random.default_rng(0).integers(0, 256, 1270).tolist()
    assert teacher_forced_logits(runner, ids, num_prefill=1260).isfinite().all()
    with pytest.raises(ConfigError, match="--max-model-len 1281: the model's context is 1280"):
        make_runner(folder, max_model_len=1281)


def test_head_dim_left_out_is_served(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, hidden_size=64, num_attention_heads=4, head_dim=128, initializer_range=0.1)
    ids = list(range(40))
    expected = teacher_forced_logits(make_runner(folder), ids, 30)
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(teacher_forced_logits(make_runner(folder), ids, 30), expected, atol=0, rtol=0)


def test_a_tied_head_that_differs_is_a_warning_and_an_equal_one_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_random_model(tmp_path, tie_word_embeddings=True, initializer_range=0.1)
    path = folder / "model.safetensors"
    weights = load_file(path)
    expected = make_runner(folder).info.fingerprint
    embedding = weights["model.embed_tokens.weight"]
    other = embedding.clone()
    other[-1, -1] += 1
    for head, is_warned in ((embedding.clone(), False), (other, True), (other[:-1].clone(), True)):
        save_file({**weights, "lm_head.weight": head}, path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert make_runner(folder).info.fingerprint == expected
        found = [
            r.getMessage()
            for r in caplog.records
            if "lm_head.weight differs from model.embed_tokens.w" in r.getMessage()
        ]
        assert len(found) == is_warned


def test_the_eos_of_the_tokenizer_and_what_is_ignored_reach_the_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_random_model(tmp_path, vocab_size=1024)
    shutil.copy(Path("tandem/embedded_model/tokenizer.json"), folder)
    end_of_text = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    change(folder, "generation_config.json", eos_token_id=5, no_repeat_ngram_size=3)
    with caplog.at_level(logging.WARNING):
        assert make_runner(folder).info.eos_token_ids == (5, end_of_text)
    assert "no_repeat_ngram_size 3" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**24, "hidden_size": 2**24},
        {"num_attention_heads": 2**24, "num_key_value_heads": 2**24, "head_dim": 2**24},
    ],
)
def test_sizes_beyond_all_memory_are_refused_by_the_file(changes: dict[str, int], tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    change(folder, "config.json", **changes)
    with pytest.raises(ModelError, match=r"config\.json: too little memory"):
        make_runner(folder)
