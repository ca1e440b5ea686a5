"""Conversations as prompts over real gRPC, against transformers' tokens and the fake model's true output."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.chat.chat_renderer import MODULE, ChatRenderer
from tests.contract.services import Services, error_of, stream_request, true_tokens, violations
from tests.support.chats import CONVERSATIONS, QWEN3_TEMPLATE, TOOLS, USER, Message, chat_of
from tests.support.tokenizers import EMBEDDED

NAMES = [
    "system, options 0",
    "calls, options 1",
    "thoughts, options 2",
    "unicode, options 3",
    "special tokens, options 0",
]


def message_of(messages: list[Message], **options: Any) -> inference_pb2.Chat:
    """The conversation as the API has it."""
    chat = chat_of(messages, **options)
    return inference_pb2.Chat(
        messages=[
            inference_pb2.ChatMessage(
                role=each.role,
                content=each.content,
                reasoning_content=each.reasoning_content,
                tool_calls=[
                    inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                    for call in each.tool_calls
                ],
                tool_call_id=each.tool_call_id,
                name=each.name,
            )
            for each in chat.messages
        ],
        tools=chat.tools,
        add_generation_prompt=chat.add_generation_prompt,
        enable_thinking=chat.enable_thinking,
        chat_template_kwargs=chat.template_kwargs,
        continue_final_message=chat.continue_final_message,
    )


def chat_request(chat: inference_pb2.Chat, **fields: Any) -> inference_pb2.GenerateStreamRequest:
    request = stream_request((), 8, **fields)
    request.prompt.CopyFrom(inference_pb2.Prompt(chat=chat))
    return request


@pytest.fixture
def qwen3_folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").symlink_to(EMBEDDED)
    (tmp_path / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return tmp_path


async def test_a_chat_is_the_prompt_that_transformers_makes_of_it(qwen3_folder: Path) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED), chat_template=QWEN3_TEMPLATE)
    async with Services(tokenizer=str(qwen3_folder)) as services:
        info = await services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert info.has_chat_template
        for name in NAMES:
            messages, options = CONVERSATIONS[name]
            ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            request = chat_request(message_of(messages, **options))
            tokens = await services.inference.Tokenize(inference_pb2.TokenizeRequest(chat=request.prompt.chat))
            assert list(tokens.token_ids) == ids, name
            streamed, unary = await services.stream(request), await services.generate(request)
            assert streamed.token_ids == list(unary.choices[0].token_ids) == true_tokens(request, ids), name
            assert streamed.usage.num_prompt_tokens == len(ids)


async def test_what_is_wrong_with_a_chat_is_named() -> None:
    chat = message_of([USER], tools=TOOLS)
    async with Services() as services:
        for field, changes in (
            ("prompt.chat.tools[1]", {"tools": ["{}", "x"]}),
            ("prompt.chat.messages", {"messages": []}),
            ("prompt.chat.messages[0].tool_calls[0].arguments", {"messages": [called("[]")]}),
            ("prompt.chat.chat_template_kwargs", {"chat_template_kwargs": "[]"}),
            ("prompt.chat", {"messages": [inference_pb2.ChatMessage(role="user", content="x " * 20_000)]}),
        ):
            wrong = inference_pb2.Chat(**{"messages": chat.messages, **changes})
            for call in (services.stream, services.generate):
                error = await error_of(call(chat_request(wrong)))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and list(violations(error)) == [field]
        both = chat_request(chat)
        both.prompt.text = "x"
        assert "has text and chat" in violations(await error_of(services.stream(both)))["prompt"]
        tokenize = inference_pb2.TokenizeRequest(text="x", chat=chat)
        assert list(violations(await error_of(services.inference.Tokenize(tokenize)))) == ["text"]


def called(arguments: str) -> inference_pb2.ChatMessage:
    return inference_pb2.ChatMessage(
        role="assistant", tool_calls=[inference_pb2.ToolCall(name="clock", arguments=arguments)]
    )


async def test_a_template_that_never_ends_costs_its_own_chat_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatRenderer.__init__, "__kwdefaults__", {"time_limit_s": 0.5})
    (tmp_path / "tokenizer.json").symlink_to(EMBEDDED)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    requests = [stream_request((number, 2, 3), 20) for number in range(4)]
    async with Services(tokenizer=str(tmp_path)) as services:
        chat = asyncio.create_task(error_of(services.stream(chat_request(message_of([USER])))))
        while not chat.done():
            outputs = await asyncio.gather(*map(services.stream, requests))
            assert [output.token_ids for output in outputs] == [true_tokens(request) for request in requests]
        assert (await chat).code() is grpc.StatusCode.INTERNAL and "0.5 s" in str((await chat).details())


async def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(EMBEDDED)
    async with Services(tokenizer=str(tmp_path)) as services:
        error = await error_of(services.stream(chat_request(message_of([USER]))))
        assert violations(error) == {"prompt.chat": "the model has no chat template"}
        info = await services.inference.GetModelInfo(inference_pb2.GetModelInfoRequest())
        assert not info.has_chat_template


async def test_a_killed_renderer_costs_nobody_anything() -> None:
    request, chat = stream_request("Hello", 60), chat_request(message_of([USER]))
    async with Services() as services:
        expected = true_tokens(request, Tokenizer.from_file(str(EMBEDDED)).encode("Hello").ids)
        right = await services.stream(chat)
        [renderer] = [each for each in psutil.Process().children() if MODULE in each.cmdline()]
        renderer.suspend()
        streams = [asyncio.create_task(services.stream(each)) for each in (request, chat, request)]
        await asyncio.sleep(0.1)
        assert not streams[1].done()
        renderer.kill()
        outcomes = [each.token_ids for each in await asyncio.gather(*streams)]
        assert outcomes == [expected, right.token_ids, expected]
    assert not [each for each in psutil.Process().children() if MODULE in each.cmdline()]
