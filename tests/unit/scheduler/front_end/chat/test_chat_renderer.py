"""Renderers' processes bound what a template may take, and whatever a template does to one costs its own chat alone."""

import asyncio
from dataclasses import replace
from typing import Any

import psutil
import pytest

from tandem_scheduler.front_end.chat import chat_renderer
from tandem_scheduler.front_end.chat.chat_renderer import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    MAX_TOOL_CALLS,
    SHORT_BYTES,
    ChatRenderer,
)
from tandem_scheduler.front_end.chat.template_folder import ChatTemplates
from tandem_scheduler.front_end.generation_params import Chat, ChatMessage, ToolCall
from tandem_shared.errors import InvalidRequest, QueueFull, TextFailed
from tests.support.chats import USER, chat_of
from tests.support.unreadable import Unreadable

TIME_LIMIT_S = 1.0
HOSTILE = """{%- set what = messages[0].content %}
{%- macro deeper() %}{{ deeper() }}{% endmacro %}
{%- if what == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif what == 'write' %}{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}
{%- elif what == 'memory' %}{{ ('x' * 10**9) | length }}
{%- elif what == 'slow memory' %}{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}
{%- endfor %}
{%- elif what == 'deep' %}{{ deeper() }}
{%- elif what == 'class' %}{{ ''.__class__.__mro__ }}
{%- elif what == 'globals' %}{{ raise_exception.__globals__.json }}
{%- elif what == 'namespace' %}{% set ns = namespace() %}{% set ns.__class__ = 1 %}
{%- elif what == 'change' %}{{ messages.append(1) }}
{%- elif what == 'file' %}{% include '/etc/passwd' %}
{%- elif what == 'undefined' %}{{ nothing.at.all }}
{%- elif what == 'surrogate' %}{{ '"\\\\ud800"' | string }}{{ custom }}
{%- elif what == 'refuse' %}{{ raise_exception('not ' ~ what) }}
{%- else %}{{ what }}{% endif %}"""


def said(content: str, **changes: Any) -> Chat:
    return replace(chat_of([{**USER, "content": content}]), **changes)


def renderer(template: str = HOSTILE, **options: Any) -> ChatRenderer:
    return ChatRenderer(ChatTemplates({"default": template}, {}), **options)


async def refused(chats: ChatRenderer, chat: Chat) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await chats.render("prompt.chat", chat)
    assert caught.value.violations[0].field.startswith("prompt.chat")
    return str(caught.value)


async def test_a_hostile_template_costs_its_own_chat_alone() -> None:
    chats = renderer(time_limit_s=30.0)
    assert await chats.render("prompt.chat", said("before")) == "before"
    for what, reason in (
        ("write", "more than"),
        ("deep", "RecursionError"),
        ("class", "SecurityError"),
        ("globals", "SecurityError"),
        ("namespace", "SecurityError"),
        ("change", "SecurityError"),
        ("file", "no loader"),
        ("undefined", "UndefinedError"),
        ("refuse", "refuses it: not refuse"),
    ):
        assert reason in await refused(chats, said(what))
    assert "Unicode" in await refused(chats, said("surrogate", template_kwargs='{"custom": "\\ud800"}'))
    for what in ("memory", "slow memory"):
        with pytest.raises(TextFailed, match="memory"):
            await chats.render("prompt.chat", said(what))
        assert await chats.render("prompt.chat", said("after")) == "after"
    await chats.close()


async def test_a_template_that_never_ends_is_killed() -> None:
    chats = renderer(time_limit_s=TIME_LIMIT_S)
    with pytest.raises(TextFailed, match="took more than 1 s"):
        await chats.render("prompt.chat", said("loop"))
    assert await chats.render("prompt.chat", said("after")) == "after"
    await chats.close()


@pytest.mark.parametrize("template", ["{% if", "{{ a b }}", "{% frobnicate %}", "{{ 'x' | no_filter }}"])
async def test_a_wrong_template_is_said_to_be_wrong(template: str) -> None:
    chats = renderer(template)
    assert "the model's chat template is not valid: line 1" in await refused(chats, said("x"))
    await chats.close()
    assert "no chat template" in await refused(ChatRenderer(None), said("x"))


async def test_a_cancelled_chat_leaves_its_answer_to_nobody() -> None:
    chats = renderer()
    await chats.render("prompt.chat", said("first"))
    for number in range(20):
        given_up = asyncio.create_task(chats.render("prompt.chat", said(f"given up {number}")))
        waiting = [asyncio.create_task(chats.render("prompt.chat", said(f"{number} {each}"))) for each in range(3)]
        for _ in range(number % 5):
            await asyncio.sleep(0)
        given_up.cancel()
        waiting.pop(1).cancel()
        assert await asyncio.gather(*waiting) == [f"{number} 0", f"{number} 2"]
    assert chats._short._num_bytes == 0
    await chats.close()


def process_of(chats: ChatRenderer) -> psutil.Process:
    assert chats._short._process is not None
    return psutil.Process(chats._short._process.pid)


async def test_a_process_that_is_killed_costs_no_chat() -> None:
    chats = renderer()
    await chats.render("prompt.chat", said("first"))
    killed = process_of(chats)
    killed.kill()
    assert await chats.render("prompt.chat", said("second")) == "second"
    process_of(chats).suspend()
    waiting = asyncio.create_task(chats.render("prompt.chat", said("third")))
    await asyncio.sleep(0.1)
    process_of(chats).kill()
    assert await waiting == "third"
    last = process_of(chats)
    await chats.close()
    assert not psutil.pid_exists(killed.pid) and not psutil.pid_exists(last.pid)


async def test_a_template_that_ends_its_process_ends_its_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "MODULE", "this")
    with pytest.raises(TextFailed, match="twice"):
        await renderer().render("prompt.chat", said("x"))


async def test_no_process_is_left_if_the_server_stops_while_one_renders() -> None:
    chats = renderer()
    await chats.render("prompt.chat", said("first"))
    waiting = asyncio.create_task(chats.render("prompt.chat", said("loop")))
    await asyncio.sleep(0.1)
    last = process_of(chats)
    await chats.close()
    with pytest.raises(TextFailed):
        await waiting
    assert chats._short._process is None and not psutil.pid_exists(last.pid)


async def test_a_short_chat_does_not_wait_for_a_long_one() -> None:
    chats = renderer(time_limit_s=TIME_LIMIT_S)
    long = said("loop", tools=['{"a": "' + "x" * SHORT_BYTES + '"}'])
    task = asyncio.create_task(chats.render("prompt.chat", long))
    assert await chats.render("prompt.chat", said("short")) == "short"
    assert not task.done()
    with pytest.raises(TextFailed):
        await task
    await chats.close()


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "MAX_BYTES_AT_ONCE", 2000)
    chats = renderer()
    outcomes = await asyncio.gather(
        *(chats.render("prompt.chat", said("x" * 500)) for _ in range(10)), return_exceptions=True
    )
    assert {type(each) for each in outcomes} == {str, QueueFull}
    assert await chats.render("prompt.chat", said("y" * 5000)) == "y" * 5000
    await chats.close()


@pytest.mark.parametrize(
    ("field", "chat"),
    [
        ("prompt.chat.messages", said("x", messages=[])),
        ("prompt.chat.messages", said("x", messages=Unreadable(MAX_MESSAGES + 1))),
        ("prompt.chat.tools", said("x", tools=Unreadable(1025))),
        (
            "prompt.chat.messages",
            said("x", messages=[ChatMessage(role="a", tool_calls=Unreadable(MAX_TOOL_CALLS + 1))]),
        ),
        ("prompt.chat", said("x" * (MAX_CHARACTERS + 1))),
        ("prompt.chat", said("x", tools=["x" * MAX_CHARACTERS])),
        ("prompt.chat", said("x", template_kwargs="x" * MAX_CHARACTERS)),
        (
            "prompt.chat",
            said("x", messages=[ChatMessage(role="a", tool_calls=[ToolCall("", "", "x" * 3 * 10**6)] * 2)]),
        ),
    ],
)
async def test_what_is_too_much_starts_no_process(field: str, chat: Chat) -> None:
    chats = renderer()
    assert f"{field}: must" in await refused(chats, chat)
    assert chats._short._process is chats._long._process is None


async def test_the_longest_chat_has_the_memory_that_it_needs() -> None:
    chats = renderer("{% for message in messages %}{{ message.content }}{% endfor %}")
    content = "🎭" * (MAX_CHARACTERS // MAX_MESSAGES - 4)
    chat = Chat(messages=[ChatMessage(role="user", content=content)] * MAX_MESSAGES)
    assert await chats.render("prompt.chat", chat) == content * MAX_MESSAGES
    await chats.close()
