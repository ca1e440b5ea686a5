"""The HTTP gateway before a real scheduler service, with OpenAI's own client. The truth is what gRPC gives."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from tandem.v1 import inference_pb2
from tandem_scheduler.service import SchedulerService
from tandem_shared.config import SchedulerSettings
from tests.contract.gated_worker import gated_runner, open_gate
from tests.contract.services import MODEL, WAIT_S, Services, set_field, stream_request
from tests.support.chats import QWEN3_TEMPLATE, TOOLS, USER
from tests.support.gateway import Gateway, head, read_answer
from tests.support.tokenizers import EMBEDDED

PROMPT = "ROMEO:\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").symlink_to(EMBEDDED)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return folder


@pytest.fixture
async def services(folder: Path) -> AsyncIterator[Services]:
    async with Services(tokenizer=str(folder)) as services:
        yield services


@pytest.fixture
async def gateway(services: Services) -> AsyncIterator[Gateway]:
    async with Gateway(services.address) as gateway:
        yield gateway


async def refusal(call: Awaitable[Any]) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await call
    return caught.value


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


async def test_each_field_reaches_grpc_under_its_own_name(services: Services, gateway: Gateway) -> None:
    fields = {
        "min_p": 0.1, "top_k": 40, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": -0.3,
        "logit_bias": {"5": 1.5, "9": -2}, "bad_words": ["thou"], "min_tokens": 3, "stop_token_ids": [7, 11],
        "ignore_eos": True, "allowed_token_ids": list(range(500)), "cache_salt": "s", "priority": 2, "top_p": 0.9,
    }  # fmt: skip
    request = stream_request(PROMPT, 20, temperature=0.9, seed=5, stop_strings=["zzz"])
    for name, value in fields.items():
        set_field(request, name, {int(k): v for k, v in value.items()} if isinstance(value, dict) else value)
    truth = (await services.generate(request)).choices[0]
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0.9, "seed": 5, "stop": "zzz", **fields}
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


async def test_tokens_models_and_state(services: Services, gateway: Gateway) -> None:
    tokens = (await gateway.post("/tokenize", {"prompt": PROMPT})).json()
    direct = await services.inference.Tokenize(inference_pb2.TokenizeRequest(text=PROMPT))
    assert tokens["tokens"] == list(direct.token_ids) and tokens["count"] == len(direct.token_ids)
    assert (await gateway.post("/detokenize", {"tokens": tokens["tokens"]})).json() == {"prompt": PROMPT}
    chat = (await gateway.post("/tokenize", {"messages": [USER], "tools": TOOLS})).json()
    assert chat["count"] > tokens["count"]
    [model] = (await gateway.client.models.list()).data
    assert model.id == MODEL
    assert (await gateway.client.models.retrieve(MODEL)).id == MODEL
    assert (await refusal(gateway.client.models.retrieve("other"))).status_code == 404
    assert (await gateway.get("/version")).json() == {"version": "0.1.0"}
    assert (await gateway.get("/health")).status == 200
    await services.drain()
    assert (await gateway.get("/health")).status == 503


WRONG_BODIES: list[tuple[str, Any, int, str | None]] = [
    ("/v1/completions", {"prompt": PROMPT, "model": "other"}, 404, "model"),
    ("/v1/completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": "many"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 10**6, "stream": True}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"10000": 1}}, 400, "logit_bias[10000]"),
    ("/v1/completions", {"prompt": PROMPT, "logprobs": 50}, 400, "logprobs"),
    ("/v1/completions", {"prompt": PROMPT, "n": 65}, 400, "n"),
    ("/v1/completions", {"prompt": PROMPT, "echo": True}, 400, "echo"),
    ("/v1/completions", {"prompt": PROMPT, "best_of": 2}, 400, "best_of"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
    ("/v1/completions", {"prompt": []}, 400, "prompt"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("/v1/completions", {"prompt": PROMPT, "guided_regex": "("}, 400, "response_format"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", [], 400, None),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [USER], "top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"messages": [USER], "tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"messages": [USER], "modalities": ["audio"]}, 400, "modalities"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        None,
    ),
    ("/v1/responses", {"input": [{"type": "image_generation_call"}]}, 400, None),
    ("/v1/responses", {"input": "a", "n": 2}, 400, "n"),
    ("/v1/responses", {"input": "a", "seed": "x"}, 400, "seed"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, 400, "max_tokens"),
    ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"]}, 400, "include"),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
    ("/v1/nothing", {}, 404, None),
]


async def test_what_is_wrong_is_said_in_openais_form(gateway: Gateway) -> None:
    for path, body, status, param in WRONG_BODIES:
        answer = await gateway.post(path, body)
        error = answer.error()
        assert answer.status == status, (path, body, error)
        assert param is None or error["param"] == param, (body, error)
        assert answer.headers["x-request-id"]
    assert (await gateway.get("/v1/completions")).status == 405


async def test_request_ids_pass_through_and_live_ones_are_taken(folder: Path) -> None:
    runner = gated_runner(1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:
        headers = {"x-request-id": "mine"}
        first = asyncio.create_task(gateway.post("/v1/completions", {"prompt": PROMPT}, headers))
        await services.wait_load(lambda load: load.num_running_sequences == 1, "the request runs")
        second = await gateway.post("/v1/completions", {"prompt": PROMPT}, headers)
        assert second.status == 409 and second.headers["x-request-id"] == "mine"
        open_gate(runner)
        answer = await first
        assert answer.status == 200
        assert answer.headers["x-request-id"] == "mine" and answer.json()["id"] == "cmpl-mine"


async def test_a_client_that_goes_away_ends_its_request(folder: Path) -> None:
    runner = gated_runner(1, permits=1)
    async with Services(runner, tokenizer=str(folder)) as services, Gateway(services.address) as gateway:

        async def start(stream: bool) -> Callable[[], None]:
            body = f'{{"prompt": "ROMEO", "max_tokens": 500, "stream": {str(stream).lower()}}}'.encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(head("POST", "/v1/completions", len(body)) + body)
            if stream:
                await reader.readuntil(b"data: ")
            return writer.close

        closes = [await start(stream) for stream in (True, False)]
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 2, "both requests are there"
        )
        for close in closes:
            close()
        open_gate(runner, 4)
        await services.wait_load(
            lambda load: load.num_running_sequences + load.num_waiting_sequences == 0, "both requests are gone"
        )
        open_gate(runner)


async def test_a_full_queue_is_429_with_the_time_to_wait(folder: Path) -> None:
    runner = gated_runner(1)
    settings: dict[str, Any] = {"tokenizer": str(folder), "max_num_waiting": 1, "max_num_seqs": 1}
    async with Services(runner, **settings) as services, Gateway(services.address) as gateway:
        body = {"prompt": PROMPT, "max_tokens": 4}
        open_calls = [asyncio.create_task(gateway.post("/v1/completions", body))]
        await services.wait_load(lambda load: load.num_running_sequences == 1, "one runs")
        open_calls.append(asyncio.create_task(gateway.post("/v1/completions", body)))
        await services.wait_load(lambda load: load.num_waiting_sequences == 1, "one waits")
        for stream in (False, True):
            answer = await gateway.post("/v1/completions", {**body, "stream": stream})
            assert answer.status == 429 and answer.error()["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        # OpenAI's client tries again by itself, after that time.
        retrying = gateway.new_client(max_retries=3)
        patient = asyncio.create_task(retrying.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4))
        await asyncio.sleep(0.2)
        open_gate(runner)
        assert (await patient).usage.completion_tokens == 4
        assert [answer.status for answer in await asyncio.gather(*open_calls)] == [200, 200]
        await retrying.close()


class Keys(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the right key, as a scheduler's own interceptor may."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong key")

        if dict(details.invocation_metadata).get("authorization") == "Bearer right":
            return await continuation(details)
        handler = await continuation(details)
        kind = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return kind(refuse, handler.request_deserializer, handler.response_serializer)


async def test_keys_are_checked_by_the_scheduler(services: Services) -> None:
    settings = SchedulerSettings(model=MODEL, port=0, api_server_count=0, worker_address=services.worker_address)
    await services.service.stop(0)
    service = SchedulerService(settings, interceptors=[Keys()])
    async with Gateway(f"127.0.0.1:{await service.start()}") as gateway:
        for stream in (False, True):
            error = await refusal(gateway.client.completions.create(model=MODEL, prompt=PROMPT, stream=stream))
            assert isinstance(error, openai.AuthenticationError) and error.code == "invalid_api_key"
        right = gateway.new_client("right")
        assert (await right.models.list()).data
        await right.close()
    await service.stop(0)


async def test_without_a_scheduler_or_a_worker_it_is_503() -> None:
    async with Gateway("127.0.0.1:1") as gateway:
        answers = [await gateway.post("/v1/completions", {"prompt": PROMPT}), await gateway.get("/health")]
        assert [answer.status for answer in answers] == [503, 503]
        assert all("retry-after" in answer.headers for answer in answers)
        assert (await gateway.get("/version")).status == 200


async def test_bodies_are_bounded_in_size_and_time(services: Services) -> None:
    async with Gateway(services.address, http_max_body_bytes=2000, http_body_timeout_s=0.3) as gateway:
        answer = await gateway.post("/v1/completions", {"prompt": "a" * 3000})
        assert answer.status == 413 and answer.error()["type"] == "invalid_request_error"

        async def send(start: bytes) -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(start)
            answer = await asyncio.wait_for(read_answer(reader), WAIT_S)
            writer.close()
            return answer.status

        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        assert await send(chunked + b"bb8\r\n" + b"a" * 3000 + b"\r\n") == 413
        assert await send(head("POST", "/v1/completions", 100) + b"{") == 408
        assert await send(head("POST", "/v1/completions", 3) + b"{a}") == 400
        assert (await gateway.post("/v1/completions", {"prompt": "a", "max_tokens": 2})).status == 200


async def test_hostile_bodies_end_with_an_answer_in_the_right_form(gateway: Gateway) -> None:
    source = random.Random(16)
    valid: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "stop": ["a"], "logprobs": 1, "stream": False}),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 2, "tools": TOOLS, "tool_choice": "auto", "n": 1}),
        ("/v1/responses", {"input": [USER], "tools": [], "max_output_tokens": 2, "text": {}, "reasoning": {}}),
        ("/tokenize", {"prompt": PROMPT}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]
    values: list[Any] = [
        None, True, -1, 0, 2**63, 1e308, "", "x", "\ud800", "\x00", [], {}, [[]], [None], {"a": []}, [{}] * 3,
        "9" * 5000,
    ]  # fmt: skip
    names = [
        "seed",
        "stop",
        "logit_bias",
        "response_format",
        "structured_outputs",
        "stream_options",
        "tool_choice",
        "zz",
    ]
    for _ in range(150):
        path, body = source.choice(valid)
        changed = {**body, source.choice([*body, *names]): source.choice(values)}
        answer = await gateway.post(path, changed)
        assert answer.status in (200, 400, 404), (changed, answer.body)
        if answer.status != 200:
            answer.error()


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
