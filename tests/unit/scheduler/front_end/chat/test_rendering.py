"""Conversations become the text and the tokens that transformers' apply_chat_template makes of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tandem_scheduler.front_end.chat.chat_renderer import ChatRenderer, _read_chat
from tandem_scheduler.front_end.chat.rendering import ChatRefused, Renderer
from tandem_scheduler.front_end.chat.template_folder import ChatTemplates, read_chat_templates
from tandem_scheduler.front_end.generation_params import ChatMessage, ToolCall
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tests.support.chats import CONVERSATIONS, QWEN3_TEMPLATE, TOOLS, USER, Message, chat_of
from tests.support.tokenizers import EMBEDDED, embedded

EMBEDDED_TEMPLATE = json.loads(EMBEDDED.with_name("tokenizer_config.json").read_text())["chat_template"]
MAX_CHARACTERS = 10**6
FEATURES = """{%- set seen = namespace(count=0, self='x') %}
{%- for message in messages %}
    {%- if message.role == 'skipped' %}{% continue %}{% endif %}
    {%- set seen.count = seen.count + 1 %}
    {% generation %}
    {%- set inner = message.content | trim %}
{{ inner }}{{ seen.self }}{% endgeneration %}
    {%- if loop.index == 3 %}{% break %}{% endif %}
{%- endfor %}
{{ dict(a=1, b=[none, true, 1.5, '<é>']) | tojson(indent=2) }}{{ dict.fromkeys(['x'], 2) | tojson }}
{{ eos_token }}|{{ bos_token is defined }}|{{ tools is none }}|{{ documents is none }}|{{ seen.count }}
{{ strftime_now('%Y') | length }}{{ custom | default('nothing') }}{{ inner is defined }}
{{ (messages | map(attribute='reasoning_content') | list)[0] | default('') }}
{{ (messages | map(attribute='thinking') | list)[0] | default('') }}
"""
"""A template of what templates may use beside what Qwen3's does."""


def reference(template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(EMBEDDED), chat_template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def templates_of(template: str) -> ChatTemplates:
    return ChatTemplates({"default": template}, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})


async def render(template: str, messages: list[Message], **options: Any) -> str:
    chat = await _read_chat("chat", chat_of(messages, **options))
    return Renderer(templates_of(template)).render(chat, MAX_CHARACTERS)


@pytest.mark.parametrize(
    "template", [QWEN3_TEMPLATE, EMBEDDED_TEMPLATE, FEATURES], ids=["Qwen3", "embedded", "features"]
)
async def test_texts_and_tokens_are_those_of_transformers(template: str) -> None:
    assert len(CONVERSATIONS) >= 40
    tokenizer, encoder, renderer = reference(template), TextEncoder(embedded()), ChatRenderer(templates_of(template))
    for name, (messages, options) in CONVERSATIONS.items():
        text = await renderer.render("chat", chat_of(messages, **options))
        assert text == tokenizer.apply_chat_template(messages, tokenize=False, **options), name
        ids = await encoder.encode("chat", text, max_tokens=10**6, add_special_tokens=False)
        expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        assert ids.tolist() == expected, name
    await renderer.close()


texts = st.text(max_size=12) | st.sampled_from(["", "<think>a</think>b", "</think>", "\n\n x \n", "<|im_end|>"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.text(min_size=1, max_size=8),
    st.dictionaries(texts, values, max_size=3),
)
any_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool", "other"]), "content": texts},
    optional={"reasoning_content": texts, "tool_calls": st.lists(calls, min_size=1, max_size=3), "name": texts},
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(any_message, min_size=1, max_size=6),
    st.none() | st.just(TOOLS),
    st.none() | st.booleans(),
    st.booleans(),
)
async def test_any_conversation_is_rendered_as_transformers_renders_it(
    messages: list[Message], tools: list[Any] | None, thinking: bool | None, is_prompt_added: bool
) -> None:
    options: dict[str, Any] = {"add_generation_prompt": is_prompt_added, "tools": tools}
    if thinking is not None:
        options["enable_thinking"] = thinking
    expected = QWEN3.apply_chat_template(messages, tokenize=False, **options)
    assert await render(QWEN3_TEMPLATE, messages, **options) == expected


QWEN3 = reference(QWEN3_TEMPLATE)


@pytest.mark.parametrize("content", ["It is", " spaces \n", "", "<|im_end|>"])
@pytest.mark.parametrize("template", [QWEN3_TEMPLATE, EMBEDDED_TEMPLATE, FEATURES])
async def test_a_last_message_is_continued(template: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    expected = reference(template).apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert await render(template, messages, continue_final_message=True) == expected


async def test_what_is_left_out_has_the_documented_default() -> None:
    text = await render(EMBEDDED_TEMPLATE, [USER])
    assert text == reference(EMBEDDED_TEMPLATE).apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    expected = reference(QWEN3_TEMPLATE).apply_chat_template([USER, {**call, "content": ""}], tokenize=False)
    assert await render(QWEN3_TEMPLATE, [USER, call], add_generation_prompt=False) == expected


async def test_what_is_wrong_is_named() -> None:
    template = "{% if messages[0].name == 'x' %}{{ raise_exception('no such name') }}{% endif %}"
    right = chat_of([USER])
    for path, reason, changes in (
        (".tools[1]", "no JSON object", {"tools": ["{}", "[]"]}),
        (".messages[0].role", "is empty", {"messages": [ChatMessage(role="")]}),
        (".messages[0].tool_calls[0].name", "is empty", {"messages": [called(ToolCall("", "", ""))]}),
        (".messages[0].tool_calls[0].arguments", "not JSON", {"messages": [called(ToolCall("", "f", "x"))]}),
        (".chat_template_kwargs", "messages", {"template_kwargs": '{"messages": []}'}),
        (".chat_template_kwargs", "chat_template", {"template_kwargs": '{"chat_template": "x"}'}),
        (".chat_template_kwargs", "think", {"template_kwargs": '{"enable_thinking": true}', "enable_thinking": True}),
        (".continue_final_message", "together", {"continue_final_message": True, "add_generation_prompt": True}),
        ("", "no such name", {"messages": [ChatMessage(role="user", name="x")]}),
    ):
        chat = await _read_chat("chat", replace(right, **changes))
        with pytest.raises(ChatRefused, match=reason) as caught:
            Renderer(templates_of(template)).render(chat, MAX_CHARACTERS)
        assert caught.value.path == path


def called(call: ToolCall) -> ChatMessage:
    return ChatMessage(role="assistant", tool_calls=[call])


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"x"', "NaN", '{"a": NaN}', "[" * 100_000, "9" * 10_000, "{}{}"])
async def test_json_that_is_no_object_is_refused(text: str) -> None:
    chat = await _read_chat("chat", chat_of([USER]))
    with pytest.raises(ChatRefused, match="JSON"):
        Renderer(templates_of("x")).render({**chat, "tools": [text]}, MAX_CHARACTERS)


async def test_a_template_for_tools_is_taken_if_there_are_some(tmp_path: Path) -> None:
    sources = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    tokens = {"eos_token": {"content": "</s>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": sources, **tokens}))
    templates = read_chat_templates(tmp_path)
    assert templates is not None and templates.special_tokens == {"eos_token": "</s>"}
    tooled = await _read_chat("chat", chat_of([USER], tools=TOOLS))
    assert Renderer(templates).render(tooled, 99) == "2 tools"
    assert Renderer(templates).render({**tooled, "tools": []}, 99) == "plain"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert read_chat_templates(tmp_path) == ChatTemplates({"default": "of the file"}, {"eos_token": "</s>"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    both = read_chat_templates(tmp_path)
    assert both is not None and both.sources == {"default": "of the file", "tool_use": "more"}
