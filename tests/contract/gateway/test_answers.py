"""The HTTP gateway before a real scheduler service, with OpenAI's own client. The truth is what gRPC gives."""

import asyncio
import json
import random
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerFast

from tandem.v1 import inference_pb2
from tests.contract.gateway.refusal import PROMPT, refusal
from tests.contract.services import MODEL, WAIT_S, Services, set_field, stream_request
from tests.support.chats import CONVERSATIONS, QWEN3_TEMPLATE, TOOLS, USER
from tests.support.gateway import Gateway, head, read_answer
from tests.support.tokenizers import EMBEDDED


async def test_completions_are_what_grpc_gives(services: Services, gateway: Gateway) -> None:
    request = stream_request(PROMPT, 12, temperature=0.7, seed=3, num_logprobs=2, num_choices=2, ignore_eos=True)
    truth = await services.generate(request)
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.7, "seed": 3, "logprobs": 2, "n": 2,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = await gateway.client.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == [choice.text for choice in truth.choices]
    for choice, true in zip(whole.choices, truth.choices, strict=True):
        assert choice.finish_reason == "length" and choice.logprobs is not None
        assert choice.logprobs.tokens == [each.text for each in true.logprobs]
        assert choice.logprobs.token_logprobs == pytest.approx([each.logprob for each in true.logprobs])
    usage = whole.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (truth.usage.num_prompt_tokens, 24)

    texts, tokens, ends = ["", ""], [[], []], {}
    options = {"include_usage": True}
    chunks = [
        chunk async for chunk in await gateway.client.completions.create(**asked, stream=True, stream_options=options)
    ]
    for chunk in chunks:
        assert chunk.model == MODEL and chunk.id == chunks[0].id
        for part in chunk.choices:
            texts[part.index] += part.text
            tokens[part.index] += part.logprobs.tokens if part.logprobs else []
            if part.finish_reason:
                ends[part.index] = part.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert ends == {0: "length", 1: "length"}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24


async def test_several_prompts_are_answered_in_order(services: Services, gateway: Gateway) -> None:
    prompts = [[1, 2, 3], [5, 6], [7]]
    truth = [(await services.generate(stream_request(ids, 6))).choices[0].text for ids in prompts]
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompts, "max_tokens": 6, "temperature": 0}
    whole = await gateway.client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert [choice.text for choice in whole.choices] == truth
    texts = dict.fromkeys(range(3), "")
    async for chunk in await gateway.client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == truth


async def test_chats_are_what_grpc_gives(services: Services, gateway: Gateway) -> None:
    request = stream_request((), 12, num_logprobs=1, ignore_eos=True)
    request.prompt.CopyFrom(inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[{**USER}], enable_thinking=False)))
    truth = await services.generate(request)
    asked: dict[str, Any] = {
        "model": MODEL, "messages": [USER], "max_completion_tokens": 12, "temperature": 0, "logprobs": True,
        "top_logprobs": 1,
        "extra_body": {"ignore_eos": True, "chat_template_kwargs": {"enable_thinking": False}},
    }  # fmt: skip
    whole = await gateway.client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.message.content == truth.choices[0].text and choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [each.token for each in choice.logprobs.content] == [each.text for each in truth.choices[0].logprobs]
    assert whole.usage is not None and whole.usage.prompt_tokens == truth.usage.num_prompt_tokens
    chunks = [chunk async for chunk in await gateway.client.chat.completions.create(**asked, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    reported = [part for chunk in chunks if (of := chunk.choices[0].logprobs) for part in of.content or ()]
    assert reported == choice.logprobs.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


@pytest.mark.parametrize("num_requests", [20, pytest.param(1000, marks=pytest.mark.slow)])
async def test_deltas_of_chats_add_up_to_the_whole_answer(gateway: Gateway, num_requests: int) -> None:
    """The fake model's tokens are random: parts of characters, tags of thoughts and calls, special tokens."""
    source = random.Random(num_requests)
    num_with_tags = 0

    async def compare(seed: int) -> bool:
        asked: dict[str, Any] = {
            "model": MODEL, "messages": [USER], "max_tokens": source.randint(1, 400), "seed": seed, "temperature": 1,
            "tools": TOOLS if source.random() < 0.7 else openai.omit,
            "stop": source.sample(["e", "th", "\n", "you", "<", ">"], 2) if source.random() < 0.3 else None,
            "extra_body": {"ignore_eos": True, "skip_special_tokens": source.random() < 0.5,
                           "include_stop_str_in_output": source.random() < 0.5},
        }  # fmt: skip
        [whole] = (await gateway.client.chat.completions.create(**asked)).choices
        parts = {"content": "", "reasoning_content": ""}
        calls: list[list[str]] = []
        async for chunk in await gateway.client.chat.completions.create(**asked, stream=True):
            delta = chunk.choices[0].delta.to_dict()
            for name in parts:
                parts[name] += str(delta.get(name, ""))
            for call in chunk.choices[0].delta.tool_calls or ():
                if call.id:
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
        message = whole.message.to_dict()
        assert parts == {name: message.get(name) or "" for name in parts}
        assert calls == [[each.function.name, each.function.arguments] for each in whole.message.tool_calls or ()]
        assert chunk.choices[0].finish_reason == whole.finish_reason
        return any(tag in str(message) for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"))

    for start in range(0, num_requests, 10):
        num_with_tags += sum(await asyncio.gather(*(compare(seed) for seed in range(start, start + 10))))
    assert num_with_tags > num_requests / 4


async def test_each_field_reaches_grpc_under_its_own_name(services: Services, gateway: Gateway) -> None:
    fields = {
        "min_p": 0.1, "top_k": 40, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3,
        "logit_bias": {"5": 1.5, "9": -2}, "bad_words": ["thou"], "min_tokens": 3, "stop_token_ids": [7, 11],
        "ignore_eos": True, "allowed_token_ids": list(range(500)), "cache_salt": "s", "priority": 2, "top_p": 0.9,
    }  # fmt: skip
    # OpenAI's seeds are signed.
    request = stream_request(PROMPT, 20, temperature=0.9, seed=2**64 - 5, stop_strings=["zzz"])
    for name, value in fields.items():
        set_field(request, name, {int(k): v for k, v in value.items()} if isinstance(value, dict) else value)
    truth = (await services.generate(request)).choices[0]
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0.9, "seed": -5, "stop": "zzz", **fields}
    answer = await gateway.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    [choice] = answer.json()["choices"]
    assert choice["text"] == truth.text
    reason = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}
    assert choice["finish_reason"] == reason[truth.finish.reason]


async def test_prompts_are_reported(services: Services, gateway: Gateway) -> None:
    request = stream_request([4, 5, 6], 2, num_prompt_logprobs=1)
    truth = (await services.generate(request)).prompt_logprobs
    body = {"prompt": [4, 5, 6], "max_tokens": 2, "temperature": 0, "prompt_logprobs": 1}
    [first, *rest] = (await gateway.post("/v1/completions", body)).json()["choices"][0]["prompt_logprobs"]
    assert first is None
    for entry, true in zip(rest, truth, strict=True):
        assert entry[str(true.token_id)] == {"logprob": true.logprob, "rank": true.rank, "decoded_token": true.text}


@pytest.mark.parametrize("prompt", [PROMPT + "O, é", [4, 5, 6]])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_a_prompt_is_echoed_before_its_output(gateway: Gateway, prompt: Any, max_tokens: int) -> None:
    """What evaluations ask for to score a text: its tokens' log-probabilities, which vLLM's prompt_logprobs are too."""
    truth = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED))
    ids = truth.encode(prompt) if isinstance(prompt, str) else prompt
    text = truth.decode(ids)
    asked = {"prompt": prompt, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    [plain] = (await gateway.post("/v1/completions", {**asked, "max_tokens": 3, "prompt_logprobs": 2})).json()[
        "choices"
    ]
    body = {**asked, "max_tokens": max_tokens, "echo": True}
    [whole] = (await gateway.post("/v1/completions", body)).json()["choices"]
    own = plain["logprobs"]["tokens"] if max_tokens else []
    assert whole["text"] == text + (plain["text"] if max_tokens else "")
    found = whole["logprobs"]
    assert found["tokens"] == [truth.decode([each]) for each in ids] + own
    scores = [entry[str(each)]["logprob"] for each, entry in zip(ids[1:], plain["prompt_logprobs"][1:], strict=True)]
    assert found["token_logprobs"] == [None, *scores] + (plain["logprobs"]["token_logprobs"] if max_tokens else [])
    assert found["top_logprobs"][0] is None
    for token, score, top in zip(
        found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True
    ):
        assert top[token] == score
    assert found["text_offset"] == [len("".join(found["tokens"][:number])) for number in range(len(found["tokens"]))]

    stream = await gateway.post("/v1/completions", {**body, "stream": True})
    choices = [each for chunk in stream.events() for each in chunk["choices"]]
    assert "".join(each["text"] for each in choices) == whole["text"]
    for name, values in found.items():
        assert [value for each in choices for value in (each["logprobs"] or {name: []})[name]] == values
    without = {**body, "logprobs": None, "n": 2, "stream": True}
    texts = {0: "", 1: ""}
    for chunk in (await gateway.post("/v1/completions", without)).events():
        for each in chunk["choices"]:
            texts[each["index"]] += each["text"]
    assert texts == {0: whole["text"], 1: whole["text"]}


async def test_conversations_are_the_prompts_that_transformers_makes_of_them(gateway: Gateway) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED), chat_template=QWEN3_TEMPLATE)
    for name, (messages, options) in CONVERSATIONS.items():
        ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        body = {"messages": messages, "tools": options.get("tools")}
        body["chat_template_kwargs"] = {key: value for key, value in options.items() if key != "tools"}
        answer = await gateway.post("/tokenize", body)
        assert answer.status == 200, (name, answer.body)
        assert answer.json()["tokens"] == ids, name


async def test_tokens_models_and_state(services: Services, gateway: Gateway) -> None:
    tokens = (await gateway.post("/tokenize", {"prompt": PROMPT})).json()
    direct = await services.inference.Tokenize(inference_pb2.TokenizeRequest(text=PROMPT))
    assert tokens["tokens"] == list(direct.token_ids) and tokens["count"] == len(direct.token_ids)
    assert (await gateway.post("/detokenize", {"tokens": tokens["tokens"]})).json() == {"prompt": PROMPT}
    chat = (await gateway.post("/tokenize", {"messages": [USER], "tools": TOOLS})).json()
    assert chat["count"] > tokens["count"]

    async def tokens_of(*messages: dict[str, Any]) -> list[int]:
        ids: list[int] = (await gateway.post("/tokenize", {"messages": messages})).json()["tokens"]
        return ids

    # Templates know no developers, and texts only.
    parts = [{"type": "text", "text": "To be,"}, {"type": "text", "text": "or not"}]
    developer = {"role": "developer", "content": parts}
    assert await tokens_of(developer, USER) == await tokens_of({"role": "system", "content": "To be,\nor not"}, USER)
    [model] = (await gateway.client.models.list()).data
    assert model.id == MODEL
    assert (await gateway.client.models.retrieve(MODEL)).id == MODEL
    assert (await refusal(gateway.client.models.retrieve("other"))).status_code == 404
    assert (await gateway.get("/version")).json() == {"version": "0.1.0"}
    assert (await gateway.get("/health")).status == 200
    await services.drain()
    assert (await gateway.get("/health")).status == 503


async def test_a_reader_that_stalls_holds_up_nobody_and_loses_nothing(services: Services, gateway: Gateway) -> None:
    truth = (await services.generate(stream_request(PROMPT, 1500))).choices[0].text
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
    writer.write(head("POST", "/v1/completions", len(data)) + data)
    assert (await gateway.post("/v1/completions", body)).json()["choices"][0]["text"] == truth
    answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
    writer.close()
    *events, done = answer.body.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(parts) == truth
