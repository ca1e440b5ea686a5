"""The embedded model loads in transformers and is as good as its card says, on text that it was not trained on. It
answers in a chat, and ends its answers.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen3 import Qwen3ForCausalLM

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest
from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_worker.attention.choice import Conditions, why_not_triton
from tandem_worker.startup import build_runner
from tests.support.engine import run
from training.corpus import Conversation, make_conversations, mark_ends, read_plays
from training.train_embedded_model import encode, reply_loss

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tandem" / "embedded_model"
CARD = (FOLDER / "README.md").read_text()
RESULT = json.loads((ROOT / "training" / "result.json").read_text())
MEGABYTE = 10**6
NUM_CHATS = 20
MAX_REPLY_TOKENS = 200
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


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


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_fast_kernels_take_its_sizes(model: Qwen3ForCausalLM, tp_size: int) -> None:
    config = model.config
    shares = config.intermediate_size, config.num_attention_heads * config.head_dim
    conditions = Conditions(
        capability=(9, 0),
        dtype=torch.bfloat16,
        head_dim=config.head_dim,
        widths=(config.hidden_size, *(share // tp_size for share in shares)),
        block_size=16,
        installed=frozenset({"triton"}),
    )
    assert why_not_triton(conditions) is None


def test_weights_are_bfloat16_and_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20 * MEGABYTE
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_held_out_loss_is_that_of_the_card(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor(tokenizer.encode(mark_ends(read_plays()[1]), verbose=False))
    assert len(ids) == RESULT["num_held_out_tokens"]
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)[::8]
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    expected = RESULT["held_out_loss_nats_per_token"]
    assert loss == pytest.approx(expected, abs=0.15)
    assert f"{expected} nats a token" in CARD


def test_held_out_loss_of_replies_is_that_of_the_card(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    held_out = encode(read_plays()[1], 1, tokenizer, torch.device("cpu"))
    assert int(held_out.is_reply.sum()) == RESULT["num_held_out_reply_tokens"]
    end = int(held_out.starts[NUM_CHATS])
    first = replace(held_out, chat=held_out.chat[:end], starts=held_out.starts[:NUM_CHATS])
    expected = RESULT["held_out_reply_loss_nats_per_token"]
    assert reply_loss(model, first) == pytest.approx(expected, abs=0.15)
    assert f"{expected} nats a token" in CARD


@pytest.mark.parametrize("text", ["", "ROMEO:\nO, she doth", "  two  spaces\t\n\n", "naïve 東京 🎭 \x00", "a" * 500])
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_added_token_of_qwen3_is_one_token_and_only_its_special_ones_are_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "".join([*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS])
    ids = tokenizer.encode(text)
    assert len(ids) == len(set(ids)) == len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(PLAIN_ADDED_TOKENS)


def test_turns_and_texts_end_with_tokens_that_the_configs_name(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token_id == model.config.eos_token_id == ends[0]
    assert model.generation_config.eos_token_id == ends
    assert len(tokenizer) == model.config.vocab_size


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def test_the_chat_template_writes_qwen3s_format(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "You are Romeo."},
        {"role": "user", "content": "Who goes there?"},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": "Good morrow."},
    ]
    expected = (
        "<|im_start|>system\nYou are Romeo.<|im_end|>\n"
        "<|im_start|>user\nWho goes there?<|im_end|>\n"
        "<|im_start|>assistant\nA friend.<|im_end|>\n"
        "<|im_start|>user\nGood morrow.<|im_end|>\n"
    )
    assert render(tokenizer, messages) == expected
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        prompt = render(tokenizer, messages, add_generation_prompt=True, **options)
        assert prompt == expected + "<|im_start|>assistant\n"


def test_the_chat_template_writes_tools_and_their_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    messages = [
        {"role": "system", "content": "You are Romeo."},
        {"role": "user", "content": "What hour is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "nine"},
        {"role": "tool", "content": "ten"},
    ]
    text = render(tokenizer, messages, tools=[tool], add_generation_prompt=True)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nYou are Romeo.\n\n# Tools\n\n")
    assert json.loads(system.split("<tools>\n")[1].split("\n</tools>")[0]) == tool
    one_call = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
    assert rest == (
        "<|im_start|>user\nWhat hour is it?<|im_end|>\n"
        f"<|im_start|>assistant\n{one_call}\n{one_call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nnine\n</tool_response>\n<tool_response>\nten\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def held_out_questions() -> list[Conversation]:
    """Conversations up to the user's last words, which were not trained on."""
    return [conversation[:-1] for conversation in make_conversations(read_plays()[1], 1)[:NUM_CHATS]]


def test_it_answers_held_out_lines_and_ends_its_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    settings = WorkerSettings(model=str(FOLDER), device="cpu", dtype="float32", num_blocks=1024, num_threads=1)
    runner = build_runner(settings)
    stop_ids = frozenset(runner.info.eos_token_ids)
    sampled = RowSampling(temperature=0.8, top_k=50, top_p=0.95)
    requests: list[SequenceRequest] = []
    for question in held_out_questions():
        prompt = np.array(tokenizer.encode(render(tokenizer, question, add_generation_prompt=True)), np.int32)
        for sampling in (RowSampling(temperature=0.0), replace(sampled, seed=len(requests))):
            requests.append(SequenceRequest(len(requests), prompt, MAX_REPLY_TOKENS, sampling, stop_ids))
    replies = run(Scheduler(SchedulerConfig(), runner.info), runner, requests)
    texts = {sequence_id: tokenizer.decode(ids) for sequence_id, ids in replies.items()}
    assert [text for text in texts.values() if not text.endswith("<|im_end|>")] == []
    assert min(map(len, texts.values())) > len("<|im_end|>")
    assert len(set(texts.values())) > NUM_CHATS
