"""LLM with real services and the embedded model: what it takes, what it gives, and what becomes of failures."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tandem import LLM, Chat, ConfigError, InvalidRequest, PromptsFailed, RequestOutput, SamplingParams
from tandem_shared.model_folder import resolve_model
from tests.support.chats import CALLS, RESULTS, SYSTEM, TOOLS, USER
from tests.support.tokenizers import embedded

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
TEXT = "JULIET:\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        model="embedded",
        tensor_parallel_size=1,
        kvcache_block_size=32,
        num_kvcache_blocks=-1,
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        max_num_seqs=np.int64(8),
        gpu_memory_utilization=0.8,
        dtype="float64",
        revision=None,
        max_chunk_tokens=None,
        trust_remote_code=True,
    ) as llm:
        yield llm


def test_every_form_of_a_prompt_gives_the_same_output(llm: LLM) -> None:
    ids = embedded().encode(TEXT).ids
    forms: list[Any] = [TEXT, {"prompt": TEXT}, ids, tuple(ids), np.array(ids), {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    for form in (TEXT, np.array(ids), {"prompt": TEXT}):
        outputs += llm.generate(sampling_params=GREEDY, prompts=form, use_tqdm=False)
    outputs += llm.generate(prompt_token_ids=[ids], sampling_params=[GREEDY], use_tqdm=False)
    expected = llm.client.generate(TEXT, GREEDY).choices[0]
    for output in outputs:
        assert isinstance(output, RequestOutput)
        assert output["text"] == expected.text and output["token_ids"] == list(expected.token_ids)
        assert output.prompt_token_ids == ids and output.prompt in (TEXT, None)
        assert output.outputs[0].finish_reason == "length"
    assert llm.generate([], GREEDY) == []


def test_outputs_are_in_the_order_of_prompts_each_with_its_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1 + number % 7, ignore_eos=True) for number in range(40)]
    outputs = llm.generate([[1 + number] for number in range(40)], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[1 + number] for number in range(40)]
    assert [len(output["token_ids"]) for output in outputs] == [each.max_tokens for each in params]


def test_log_probabilities_are_the_replys(llm: LLM) -> None:
    """With log-probabilities LLM streams, as a reply may be too small to hold them."""
    params = SamplingParams(seed=1, max_tokens=6, n=2, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    [output] = llm.generate(TEXT, params, use_tqdm=False)
    reply = llm.client.generate(TEXT, params)
    assert output.prompt_logprobs is not None
    reports = [[None, *reply.prompt_logprobs], *(choice.logprobs for choice in reply.choices)]
    read = [output.prompt_logprobs, *(each.logprobs for each in output.outputs)]
    for places, told in zip(read, reports, strict=True):
        assert places is not None and len(places) == len(told)
        for place, report in zip(places, told, strict=True):
            if report is not None:
                assert place is not None
                assert place[report.token_id].logprob == pytest.approx(report.logprob, abs=1e-5)
                assert {each.token_id for each in report.top} | {report.token_id} == set(place)
    assert [each.text for each in output.outputs] == [choice.text for choice in reply.choices]


def test_a_bad_prompt_is_named_and_loses_no_other(llm: LLM) -> None:
    prompts: list[Any] = [TEXT, [2**31], TEXT, "", [1] * 1024, TEXT]
    with pytest.raises(PromptsFailed, match=r"^3 of 6 prompts failed; prompts\[1\]: prompt\.token_ids: 2147") as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert sorted(caught.value.errors) == [1, 3, 4]
    assert all(isinstance(error, InvalidRequest) for error in caught.value.errors.values())
    expected = llm.client.generate(TEXT, GREEDY).choices[0].text
    assert [output and output["text"] for output in caught.value.outputs] == [
        expected, None, expected, None, None, expected,
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"^num_choices"):
        llm.generate("x", SamplingParams(n=65), use_tqdm=False)
    with pytest.raises(InvalidRequest, match=r"^prompts\[1\]: must be a text"):
        llm.generate(["x", None], use_tqdm=False)  # type: ignore[list-item]


async def test_it_works_where_an_event_loop_runs(llm: LLM) -> None:
    """As in a notebook."""
    assert len(llm.generate([TEXT, TEXT], GREEDY, use_tqdm=False)) == 2


def test_the_bar_shows_rates_and_is_finished(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT] * 3, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate([TEXT] * 3, GREEDY)
    assert re.search(r"prompts: 100%\|.*3/3 .*prefill \d+ tok/s, decode [1-9]\d* tok/s", capsys.readouterr().err)


def test_a_running_server_is_used_and_left_running(llm: LLM) -> None:
    address = llm.address
    with LLM(address=address, metadata=(("authorization", "Bearer A"),), seed=5) as other:
        first = other.generate([TEXT, TEXT], SamplingParams(max_tokens=8), use_tqdm=False)
    assert first[0]["text"] != first[1]["text"]
    with LLM(address=address, seed=5) as other:
        again = other.generate([TEXT, TEXT], SamplingParams(max_tokens=8), use_tqdm=False)
    assert [output["text"] for output in again] == [output["text"] for output in first]
    assert llm.generate(TEXT, GREEDY, use_tqdm=False)


def test_the_tokenizer_is_the_models(llm: LLM) -> None:
    tokenizer, truth = llm.get_tokenizer(), embedded()
    text = "<|im_start|>user\nO Romeo, é\U0001f600<|im_end|>\n"
    assert tokenizer.encode(text) == truth.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(np.array(tokenizer.encode(text)), skip_special_tokens=True) == truth.decode(
        truth.encode(text).ids
    )
    assert tokenizer.vocab_size == 1024
    assert truth.token_to_id("<|im_end|>") in tokenizer.eos_token_ids
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids


def test_a_program_of_vllms_may_name_what_tandem_does_not_do_if_it_asks_for_nothing(llm: LLM) -> None:
    plain = llm.generate(["O Romeo", "O Juliet"], GREEDY, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=GREEDY.max_tokens, ignore_eos=GREEDY.ignore_eos,
                            detokenize=True, spaces_between_special_tokens=True)  # fmt: skip
    assert params == GREEDY
    same = llm.generate(["O Romeo", "O Juliet"], params, use_tqdm=False, lora_request=None, priority=[1, 0])
    assert [output["token_ids"] for output in same] == [output["token_ids"] for output in plain]
    message = {"role": "user", "content": "hi"}
    [chat] = llm.chat([message], params, use_tqdm=False, chat_template=None, lora_request=None)
    assert chat["token_ids"] == llm.chat([message], GREEDY, use_tqdm=False)[0]["token_ids"]
    assert llm.get_default_sampling_params() == SamplingParams()
    with pytest.raises(InvalidRequest, match="chat_template: is not supported"):
        llm.chat([message], chat_template="{{ messages }}")  # type: ignore[arg-type]


def test_a_chat_is_what_transformers_makes_of_it(llm: LLM) -> None:
    truth = PreTrainedTokenizerFast.from_pretrained(resolve_model("embedded", []))
    chats: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Who are you?"}],
        [SYSTEM, USER, CALLS, *RESULTS],
    ]
    params = SamplingParams(temperature=0.0, max_tokens=60)
    outputs = llm.chat(chats, [params, params], False, tools=TOOLS)
    expected = [
        truth.apply_chat_template(each, tools=TOOLS, add_generation_prompt=True, return_dict=False) for each in chats
    ]
    assert [output.prompt_token_ids for output in outputs] == expected
    [alone] = llm.chat(chats[0], params, use_tqdm=False)
    assert alone.outputs[0].finish_reason == "stop" and alone["text"]
    assert alone["text"] == llm.client.generate(Chat(chats[0]), params).choices[0].text
    tokenizer = llm.get_tokenizer()
    for options in ({}, {"add_generation_prompt": True}):
        assert tokenizer.apply_chat_template(chats[1], TOOLS, **options) == truth.apply_chat_template(
            chats[1], tools=TOOLS, return_dict=False, **options
        )
        assert tokenizer.apply_chat_template(chats[0], tokenize=False, **options) == truth.apply_chat_template(
            chats[0], tokenize=False, **options
        )
    with pytest.raises(InvalidRequest, match=r"^conversations\[1\]\.messages\[0\]\.content: must be a text, is 5"):
        llm.chat([chats[0], [{"role": "user", "content": 5}]], params)
    with pytest.raises(InvalidRequest, match=r"^chat\.messages"):
        llm.chat([], params, use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"max_num_sequences": 4}, r"unknown setting max_num_sequences; did you mean max_num_seqs\? \(known: "),
        ({"tensor_parallel": 2}, r"did you mean tensor_parallel_size\?.* kvcache_block_size,"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, is 0"),
        ({"max_num_seqs": 2.0}, "max_num_seqs must be of type int, is 2.0"),
        ({"enforce_eager": 1}, "enforce_eager must be of type bool, is 1"),
        ({"dtype": "float16"}, "dtype must be one of auto, float64, float32, bfloat16, is 'float16'"),
        ({"tp_size": 1, "tensor_parallel_size": 1}, "tensor_parallel_size: is given twice, as tp_size is the same"),
        ({"address": "127.0.0.1:1", "dtype": "auto"}, "model and settings are those of the server at 127.0.0.1:1"),
        ({"address": "127.0.0.1:1", "model": "x"}, "model and settings are those of the server"),
        ({"metadata": (("a", "b"),)}, "metadata are for a server's address"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_starts(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        LLM(**settings)


def test_nano_vllms_programs_run_with_only_the_import_changed() -> None:
    program = Path(__file__).with_name("nano_vllm_programs.py")
    done = subprocess.run(
        [sys.executable, program, resolve_model("embedded", [])],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Completion: ") == 2
    assert re.search(r"Total: \d+tok, Throughput: \d", done.stdout)
