"""A generate request as plain data, before anything in it is checked. Each API makes one of its own messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form that a request's output must have. Exactly one of the fields before the last has to be set."""

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    lark: str | None = None
    start_after_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, in a message of the assistant."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """A message of a conversation."""

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation, of which the model's chat template makes the prompt. Its messages may be made when they are
    read.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[str] = ()
    """JSON objects."""
    add_generation_prompt: bool | None = None
    enable_thinking: bool | None = None
    template_kwargs: str | None = None
    """A JSON object: further variables of the template."""
    continue_final_message: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """The fields of a generate request. None stands for a field that was left out, where that differs from a zero.

    Code that makes one must not copy a sequence, or look at its elements: it may be as long as a message can be, and
    validation.py checks lengths before elements.
    """

    prompt_text: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    prompt_chat: Chat | None = None
    request_id: str = ""
    model: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Those of tandem_shared/sampling_fields.py's REQUEST_FIELDS that the request sets, by name."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_strings: Sequence[str] = ()
    include_stop_string: bool = False
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    structured_output: StructuredOutput | None = None
    num_choices: int = 1
    priority: int | None = None
    cache_salt: str = ""
    caller_salt: bytes = b""
    """Of the caller's API key; 64 bytes at most. Requests share cached prefixes only if both salts are equal."""
    max_reply_bytes: int | None = None
    """The largest reply that the reader accepts; None if the output is streamed."""
    deadline: float | None = None
    """When the call's deadline passes, in seconds of time.monotonic(); None if it has no deadline."""
