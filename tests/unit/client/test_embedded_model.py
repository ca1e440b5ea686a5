"""The embedded model loads in transformers and is as good as its card says, on text that it was not trained on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen3 import Qwen3ForCausalLM

from training.train_embedded_model import read_scenes

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tandem" / "embedded_model"
RESULT = json.loads((ROOT / "training" / "result.json").read_text())
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    loaded, report = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


def test_transformers_loads_it_as_a_qwen3_of_the_recorded_size(model: Qwen3ForCausalLM) -> None:
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.num_parameters() == RESULT["num_parameters"]
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size


def test_weights_are_bfloat16_and_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20 * MEGABYTE
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_held_out_loss_is_that_of_the_card(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor(tokenizer.encode(read_scenes()[1], verbose=False))
    assert len(ids) == RESULT["num_held_out_tokens"]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[::8]
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    expected = RESULT["held_out_loss_nats_per_token"]
    assert loss == pytest.approx(expected, abs=0.15)
    assert f"{expected} nats a token" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("text", ["", "ROMEO:\nO, she doth", "  two  spaces\t\n\n", "naïve 東京 🎭 \x00", "a" * 500])
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_is_one_token_that_every_config_names(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 0
    assert len(tokenizer) == model.config.vocab_size
