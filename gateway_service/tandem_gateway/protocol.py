"""The bodies of requests, as OpenAI's API has them, with vLLM's further fields.

Fields that are unknown here are ignored, as in vLLM, and logged once each. Fields whose effect Tandem does not have are
refused unless they ask for nothing (UNSUPPORTED). docs/http.md lists both.
"""

import logging
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tandem_gateway.problems import refuse

logger = logging.getLogger(__name__)

T = TypeVar("T")

Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first wrong item. pydantic would go on, and make an error for each of millions. For the
same reason a field that is a dict must not say what its values are.
"""

ChatItems = Annotated[list[T], Field(fail_fast=True, max_length=16384)]
"""A list that a conversation is made of. The scheduler takes no more in all of them together (its MAX_CHAT_FIELDS)."""

MAX_PROMPTS = 256
"""The most prompts of one request."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions, and vLLM's."""

MAX_LOGGED_NAMES = 1000

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "background": (None, False),
    "beam_width": (None, 1),
    "chat_template": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "documents": (None, []),
    "ec_transfer_params": (None,),
    "echo": (None, False),
    "enable_response_messages": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "image": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logprob_token_ids": (None, []),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "previous_input_messages": (None, []),
    "previous_response": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "prompt_embeds": (None,),
    "repetition_detection": (None,),
    "return_prompt_text": (None, False),
    "return_token_ids": (None, False),
    "return_token_strs": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "suffix": (None, ""),
    "thinking_token_budget": (None, -1),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
    "web_search_options": (None,),
}
"""Field -> the values that ask for nothing. Others are refused."""

WITHOUT_EFFECT = {
    "access_programs", "background_options", "include", "max_tool_calls", "metadata", "moderation", "prediction",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
    "text_verbosity", "truncation", "user", "verbosity",
    # Of vLLM: for images, for templates of other models, or for what is refused above.
    "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs", "return_mm_kwargs", "return_token_offsets",
    "routed_experts_prompt_start", "session_id", "spaces_between_special_tokens", "stream_interval", "truncation_side",
}  # fmt: skip
"""Fields that say nothing of the output here. They are ignored, and not logged."""

_logged: set[str] = set()


class Body(BaseModel):
    """The base class of bodies, which keep fields that are unknown for check_unknown()."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def check_unknown(self) -> None:
        """Raises InvalidRequest for a field that asks for what Tandem does not do; logs unknown fields."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED:
                if not any(_is_same(value, each) for each in UNSUPPORTED[name]):
                    raise refuse(name, "is not supported")
            elif name not in WITHOUT_EFFECT and name not in _logged and len(_logged) < MAX_LOGGED_NAMES:
                _logged.add(name)
                logger.warning("unknown field %r of %s is ignored", name[:100], type(self).__name__)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are the same, for which Python takes 1 and true too."""
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema of response_format."""

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs. Fields that are unknown are kept, for form_of() to refuse."""

    model_config = ConfigDict(extra="allow")
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    # What a client may send that sends all fields of vLLM's class.
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_additional_properties: Literal[False] | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_fallback: Literal[False] | None = None


class GenerationBody(Body):
    """What completions and chats have in common. A field that is None has the model's default, or the API's."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | Items[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Of vLLM from here.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Items[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    bad_words: Items[str] | None = None
    allowed_token_ids: Items[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _check_prompts(prompt: Any) -> Any:
    """Raises PydanticCustomError for what has too many prompts, before any of them is looked at."""
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        text = "must have 1 to {most} prompts, has {number}"
        raise PydanticCustomError("too_many_prompts", text, {"most": MAX_PROMPTS, "number": len(prompt)})
    return prompt


class CompletionBody(GenerationBody):
    prompt: Annotated[str | Items[str] | Items[int] | Items[Items[int]], BeforeValidator(_check_prompts)]
    max_tokens: int | None = DEFAULT_COMPLETION_TOKENS
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str


Content = str | ChatItems[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: ChatItems[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(BaseModel):
    """A tool that the model may call. `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, handler: ModelWrapValidatorHandler["Tool"]) -> "Tool":
        tool = handler(data)
        tool._given = data if isinstance(data, dict) else tool.model_dump(exclude_unset=True)
        return tool

    def given(self) -> dict[str, Any]:
        """The tool as it was given, as the model sees its fields in their order."""
        return self._given


class FunctionName(BaseModel):
    name: str


class NamedToolChoice(BaseModel):
    """A choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class ChatOptions(GenerationBody):
    """What chats and responses have in common beside the conversation."""

    tools: ChatItems[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(ChatOptions):
    messages: ChatItems[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None


class TokenizeBody(Body):
    """vLLM's /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: ChatItems[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: ChatItems[Tool] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Items[int]
