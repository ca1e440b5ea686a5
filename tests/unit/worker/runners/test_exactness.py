"""Logits in float32 against transformers' Qwen3ForCausalLM, through prefill, chunks and decode steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.teacher_forcing import teacher_forced_logits
from tandem_shared.config import WorkerSettings
from tandem_shared.errors import ModelError
from tandem_shared.model_folder import resolve_model
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.model_factory import save_random_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa_untied": {},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 24, "num_attention_heads": 6},
    "narrow_heads_tied": {"hidden_size": 64, "head_dim": 8, "num_attention_heads": 4, "tie_word_embeddings": True},
    "moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "moe_normalised_beside_dense": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_hidden_layers": 5,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    },
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 256},
    "yarn_factor": {"rope_parameters": {**YARN, "attention_factor": 1.3}, "max_position_embeddings": 256},
}


def make_runner(folder: Path | str, **settings: Any) -> TorchRunner:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_blocks": 256, "num_threads": 1}
    return build_runner(WorkerSettings(model=str(folder), **{**defaults, **settings}))


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_match_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, **{"initializer_range": 0.1, **config})
    ids = np.random.default_rng(0).integers(0, 256, 200).tolist()
    logits = teacher_forced_logits(make_runner(folder), ids, num_prefill=150)
    expected = reference_logits(folder, ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_logits_of_the_embedded_model_match_transformers() -> None:
    folder = resolve_model("embedded", [])
    ids = np.random.default_rng(0).integers(0, 1024, 300).tolist()
    logits = teacher_forced_logits(make_runner("embedded"), ids, num_prefill=250)
    torch.testing.assert_close(logits, reference_logits(folder, ids), atol=1e-4, rtol=0)


def test_rope_written_by_transformers_4_is_read_alike(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, **CONFIGS["yarn"], initializer_range=0.1)
    ids = list(range(200))
    logits = teacher_forced_logits(make_runner(folder), ids, 200)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": "yarn", **rope}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(teacher_forced_logits(make_runner(folder), ids, 200), logits, atol=0, rtol=0)


def test_shards_are_the_same_model_as_one_file(tmp_path: Path) -> None:
    whole = save_random_model(tmp_path / "whole")
    shards = save_random_model(tmp_path / "shards", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, other = make_runner(whole), make_runner(shards)
    assert one.info.fingerprint == other.info.fingerprint
    ids = list(range(50))
    torch.testing.assert_close(
        teacher_forced_logits(one, ids, 40), teacher_forced_logits(other, ids, 40), atol=0, rtol=0
    )


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    base = save_random_model(tmp_path / "a")
    fingerprints = {
        make_runner(base).info.fingerprint,
        make_runner(base, dtype="bfloat16").info.fingerprint,
        make_runner(save_random_model(tmp_path / "b", seed=1)).info.fingerprint,
        make_runner(save_random_model(tmp_path / "c", rms_norm_eps=1e-5)).info.fingerprint,
    }
    assert len(fingerprints) == 4
    assert make_runner(base, block_size=4).info.fingerprint == make_runner(base).info.fingerprint


def one_row_plan(ids: list[int], sampling: RowSampling, row: int = 0, step_id: int = 1) -> StepPlan:
    num_blocks = -(-(len(ids) + 1) // 16)
    new = NewRow(
        row=row,
        sequence_id=0,
        token_ids=np.array(ids, np.int32),
        num_prompt_tokens=len(ids),
        num_computed_tokens=0,
        num_cached_tokens=0,
        block_ids=np.arange(1, num_blocks + 1, dtype=np.int32) + 20 * row,
        sampling=sampling,
    )
    return StepPlan(
        step_id,
        added_rows=(new,),
        chunk_rows=np.array([row], np.int32),
        chunk_num_tokens=np.array([len(ids)], np.int32),
    )


def test_logprobs_are_those_of_the_raw_distribution(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, initializer_range=0.1)
    ids = list(range(30))
    sampling = RowSampling(temperature=0.5, top_k=3, seed=1, num_logprobs=5)
    result = make_runner(folder).execute(one_row_plan(ids, sampling)).wait()
    expected = reference_logits(folder, ids)[-1].log_softmax(-1)
    (report,) = result.logprobs
    top = expected.topk(5)
    assert list(report.top_token_ids) == top.indices.tolist()
    np.testing.assert_allclose(report.top_logprobs, top.values, atol=1e-4)
    assert report.logprob == pytest.approx(float(expected[result.token_ids[0]]), abs=1e-4)
    assert result.token_ids[0] in top.indices[:3]


@torch.inference_mode()
def poison(cache: torch.Tensor) -> None:
    cache.fill_(torch.nan)


def test_what_no_plan_wrote_is_never_read(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    clean, poisoned = make_runner(folder), make_runner(folder)
    poison(poisoned.cache)
    for runner in (clean, poisoned):
        runner.execute(one_row_plan(list(range(20)), RowSampling(temperature=0.0))).wait()
    steps = [[r.execute(StepPlan(2 + i)).wait().token_ids for i in range(5)] for r in (clean, poisoned)]
    assert steps[0] == steps[1]


def test_a_row_with_nan_logits_is_a_fault_of_that_row_alone(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    healthy, runner = make_runner(folder), make_runner(folder)
    sampling = RowSampling(temperature=0.0)
    for each in (healthy, runner):
        each.execute(one_row_plan(list(range(20)), sampling)).wait()
        each.execute(one_row_plan(list(range(30, 50)), sampling, row=1, step_id=2)).wait()
    # Row 1's blocks, not row 0's.
    poison(runner.cache[:, :, 21:30])
    expected = healthy.execute(StepPlan(3)).wait()
    result = runner.execute(StepPlan(3)).wait()
    assert [(fault.row, fault.code) for fault in result.faults] == [(1, 1)]
    assert result.num_token_ids == [1, 0]
    assert result.token_ids == expected.token_ids[:1]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"architectures": "absent"}, "architectures"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim"),
        ({"architectures": 5}, "architectures"),
        ({"layer_types": 5}, "layer_types"),
        ({"rope_parameters": ["x"]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
        ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {**YARN, "mscale": "a", "mscale_all_dim": 1.0}}, "mscale"),
    ],
    ids=str,
)
def test_an_unsupported_config_is_refused_by_file_and_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=rf"config\.json: {key}: "):
        make_runner(folder)


def test_wrong_weights_are_refused_by_file_and_tensor(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.safetensors: model\.layers\.2\..* and 10 others: missing"):
        make_runner(folder)
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"model\.safetensors: model\.layers\.1\..*: the model has no such tensor"):
        make_runner(folder)
    change_config(folder, num_hidden_layers=2, intermediate_size=50)
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight: has shape \[.*\], must be \[.*50.*\]"):
        make_runner(folder)
    (folder / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        make_runner(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        make_runner(folder)


def test_too_little_memory_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"too little memory: 0\.0 MiB are left for the KV pool, and 2 blocks"):
        make_runner(save_random_model(tmp_path), num_blocks=None, kv_cache_memory_gib=0.00001)


def test_a_context_longer_than_the_pool_is_cut_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(save_random_model(tmp_path), num_blocks=11)
    assert runner.info.max_model_len == 160
    assert "cut from 512 to 160 tokens" in caplog.text


def test_generation_defaults_are_the_models(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [3, 0]})
    )
    info = make_runner(folder).info
    assert info.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert info.eos_token_ids == (3, 0)
    for key, value in (
        ("eos_token_id", 999),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("temperature", "hot"),
        ("min_p", -0.1),
        ("top_p", 0),
    ):
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(ModelError, match=rf"generation_config\.json: {key}: {value!r}"):
            make_runner(folder)


def test_end_of_text_is_found_in_config_json_alone(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    change_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert make_runner(folder).info.eos_token_ids == (7,)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "noslash", "a/b/c"])
def test_a_model_that_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(name, [])
