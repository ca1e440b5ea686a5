"""Makes a conversation into what a chat template reads, and renders it: what transformers' apply_chat_template does.

It runs in a renderer's process, as a template may take any time and memory, and so may JSON that a client sends.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2

from tandem_scheduler.front_end.chat.renderer_protocol import KWARGS
from tandem_scheduler.front_end.chat.template_environment import RaisedByTemplate, create_environment
from tandem_scheduler.front_end.chat.template_folder import DEFAULT, TOOL_USE, ChatTemplates

OWN_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
"""Variables that KWARGS can't set: they have fields of their own, or, for the last, come from the model's folder."""

MAX_REASON_CHARACTERS = 500
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Appended to a last message that the model is to continue, so that the end of the message is found in the text. It is
transformers' own tag; the space at its end shows whether the template strips the message.
"""


class ChatRefused(Exception):
    """The conversation can't be rendered. `path` is that of the wrong field in the chat, such as `.tools[0]`; empty for
    the chat as a whole.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason[:MAX_REASON_CHARACTERS]


class Renderer:
    """A model's chat templates, compiled when they are first used."""

    def __init__(self, templates: ChatTemplates) -> None:
        self._templates = templates
        self._environment = create_environment()
        self._compiled: dict[str, jinja2.Template] = {}

    def render(self, chat: dict[str, Any], max_characters: int) -> str:
        """The text of a conversation. Raises ChatRefused; MemoryError where the memory does not suffice.

        chat has the fields of the API's Chat by name, as lists, dicts, texts and booleans, with None for those that
        were left out.
        """
        tools = [_object_of(text, f".tools[{index}]") for index, text in enumerate(chat["tools"])] or None
        variables: dict[str, Any] = {
            **self._templates.special_tokens,
            "documents": None,
            **_kwargs_of(chat),
            "messages": [_message_of(each, f".messages[{index}]") for index, each in enumerate(chat["messages"])],
            "tools": tools,
            "add_generation_prompt": _is_prompt_added(chat),
        }
        name = self._choose(tools is not None)
        if not chat["continue_final_message"]:
            return self._guarded(self._render, name, variables, max_characters)
        last = variables["messages"][-1]
        content = last["content"]
        if "content" not in self._templates.sources[name]:
            raise ChatRefused(".continue_final_message", "the model's chat template reads no content")
        last["content"] = content + CONTINUE_TAG
        text = self._guarded(self._render, name, variables, max_characters)
        return _cut_at_tag(text, content)

    def _choose(self, has_tools: bool) -> str:
        sources = self._templates.sources
        if has_tools and TOOL_USE in sources:
            return TOOL_USE
        if DEFAULT not in sources:
            raise ChatRefused("", f"the model has several chat templates and none is the default: {sorted(sources)}")
        return DEFAULT

    def _guarded(self, function: Callable[..., str], *args: Any) -> str:
        """Turns whatever the template raises into ChatRefused: the same template fails on the same chat again."""
        try:
            return function(*args)
        except (ChatRefused, MemoryError):
            raise
        except RaisedByTemplate as error:
            raise ChatRefused("", f"the model's chat template refuses it: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ChatRefused("", f"the model's chat template is not valid: line {error.lineno}: {error}") from error
        except Exception as error:
            reason = f"the model's chat template fails on it: {type(error).__name__}: {error}"
            raise ChatRefused("", reason) from error

    def _render(self, name: str, variables: dict[str, Any], max_characters: int) -> str:
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._templates.sources[name])
        parts, num_characters = [], 0
        for part in self._compiled[name].generate(variables):
            num_characters += len(part)
            if num_characters > max_characters:
                raise ChatRefused("", f"the model's chat template makes more than {max_characters} characters of it")
            parts.append(part)
        return "".join(parts)


def _is_prompt_added(chat: dict[str, Any]) -> bool:
    wanted, continues = chat["add_generation_prompt"], chat["continue_final_message"]
    if wanted and continues:
        raise ChatRefused(".continue_final_message", "can't be together with add_generation_prompt")
    return not continues if wanted is None else bool(wanted)


def _kwargs_of(chat: dict[str, Any]) -> dict[str, Any]:
    kwargs = _object_of(chat[KWARGS], f".{KWARGS}") if chat[KWARGS] else {}
    own = [name for name in OWN_FIELDS if name in kwargs]
    thinking = chat["enable_thinking"]
    if thinking is not None and "enable_thinking" in kwargs:
        own.append("enable_thinking")
    if own:
        raise ChatRefused(f".{KWARGS}", f"can't set {', '.join(own)}")
    return kwargs if thinking is None else {**kwargs, "enable_thinking": thinking}


def _message_of(message: dict[str, Any], path: str) -> dict[str, Any]:
    """A message as OpenAI has it, which is what templates read. What was left out is absent, but for the content."""
    built = {"role": message["role"], "content": message["content"] or ""}
    if not message["role"]:
        raise ChatRefused(f"{path}.role", "is empty")
    if (thoughts := message["reasoning_content"]) is not None:
        # gpt-oss's template has another name for it.
        built |= {"reasoning_content": thoughts, "thinking": thoughts}
    if message["tool_calls"]:
        built["tool_calls"] = [
            _call_of(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(message["tool_calls"])
        ]
    return built | {name: message[name] for name in ("tool_call_id", "name") if message[name] is not None}


def _call_of(call: dict[str, Any], path: str) -> dict[str, Any]:
    if not call["name"]:
        raise ChatRefused(f"{path}.name", "is empty")
    arguments = _object_of(call["arguments"], f"{path}.arguments") if call["arguments"] else {}
    built: dict[str, Any] = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return {"id": call["id"], **built} if call["id"] else built


def _object_of(text: str, path: str) -> dict[str, Any]:
    """The JSON object of a text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ChatRefused(path, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ChatRefused(path, "is no JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _cut_at_tag(text: str, content: str) -> str:
    """The text up to the end of the last message's content, which the tag follows."""
    tag = CONTINUE_TAG.strip()
    if content.strip() not in text or tag not in text:
        raise ChatRefused(".continue_final_message", "the model's chat template leaves out or changes the last message")
    at = text.rindex(tag)
    # Where the space is gone, the template strips the message, whose own trailing space then goes as well.
    return text[:at] if text.startswith(CONTINUE_TAG, at) else text[:at].rstrip()
