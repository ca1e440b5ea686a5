"""The bodies of /v1/responses, and the chats that they are.

Nothing is stored, so a request has its whole conversation in `input`, and previous_response_id is refused.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError

from tandem_gateway.problems import refuse
from tandem_gateway.protocol import (
    Body,
    ChatItems,
    ChatOptions,
    Content,
    Function,
    FunctionCall,
    FunctionName,
    Items,
    JsonSchema,
    Message,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolCall,
)

LOGPROBS = "message.output_text.logprobs"
NOT_PASSED_ON = {"n", "max_tokens", "max_completion_tokens", "messages", "reasoning_effort", "response_format"}
"""Fields of chats that responses do not have, or have under another name."""


class InputMessage(BaseModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(BaseModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(BaseModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(BaseModel):
    text: str


class ReasoningItem(BaseModel):
    type: Literal["reasoning"]
    content: ChatItems[ReasoningText] | None = None
    summary: ChatItems[ReasoningText] | None = None


def _type(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type),
]


class ResponseTool(Function):
    type: Literal["function"]


class ResponseToolChoice(BaseModel):
    type: Literal["function"]
    name: str


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(BaseModel):
    format: TextFormat | None = None


class ReasoningOptions(BaseModel):
    effort: str | None = None


class ResponseBody(Body):
    """Further fields of chats, such as vLLM's, are taken too."""

    model: str | None = None
    input: str | ChatItems[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    """OpenAI's have no effect on the output. The usage is always told at the end."""
    tools: ChatItems[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Items[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, Any] | None = None

    def options(self) -> ChatOptions:
        """What is asked beside the conversation. Raises InvalidRequest or RequestValidationError."""
        if LOGPROBS in (self.include or ()) or self.top_logprobs:
            raise refuse("include", "log-probabilities are in /v1/chat/completions only")
        extra = dict(self.model_extra or {})
        for name in NOT_PASSED_ON & set(extra):
            if extra[name] is not None:
                raise refuse(name, "is not a field of responses")
            del extra[name]
        given = {name: extra[name] for name in set(extra) & set(ChatOptions.model_fields)}
        unknown = {name: value for name, value in extra.items() if name not in given}
        if self.reasoning is not None and self.reasoning.effort == "none":
            given.setdefault("enable_thinking", False)
        try:
            # By their names, as unknown ones are to be noticed by check_unknown().
            return ChatOptions.model_validate(
                given
                | unknown
                | {
                    "model": self.model,
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "tools": self._tools(),
                    "tool_choice": self._tool_choice(),
                    "parallel_tool_calls": self.parallel_tool_calls,
                    "response_format": self._format(),
                }
            )
        except ValidationError as error:
            located = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise RequestValidationError(located, body=given) from error

    def messages(self) -> list[Message]:
        """The conversation."""
        messages = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, Message(role="user", content=self.input)]
        return messages + _messages(self.input)

    def _tools(self) -> list[Tool] | None:
        if self.tools is None:
            return None
        functions = [tool.model_dump(exclude={"type"}, exclude_unset=True) for tool in self.tools]
        return [Tool.model_validate({"type": "function", "function": function}) for function in functions]

    def _tool_choice(self) -> str | NamedToolChoice | None:
        if isinstance(self.tool_choice, ResponseToolChoice):
            return NamedToolChoice(type="function", function=FunctionName(name=self.tool_choice.name))
        return self.tool_choice

    def _format(self) -> ResponseFormat | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return None
        schema = JsonSchema(name=wanted.name, schema=wanted.schema_)
        return ResponseFormat(type=wanted.type, json_schema=schema if wanted.type == "json_schema" else None)


def _messages(items: Sequence[InputMessage | FunctionCallItem | FunctionOutputItem | ReasoningItem]) -> list[Message]:
    """Items as messages. What the assistant thought, said and called in a row, in that order, is one message."""
    messages: list[Message] = []
    is_open = False
    """Whether the last message is the assistant's and what it calls next belongs to it."""
    for item in items:
        last = messages[-1] if is_open else None
        if isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content or item.summary or ())
            messages.append(Message(role="assistant", reasoning_content=text or None))
        elif isinstance(item, InputMessage):
            if item.role == "assistant" and last is not None and last.content is None and not last.tool_calls:
                last.content = item.content
            else:
                messages.append(Message(role=item.role, content=item.content))
        elif isinstance(item, FunctionCallItem):
            if last is None:
                last = Message(role="assistant")
                messages.append(last)
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            last.tool_calls = [*(last.tool_calls or ()), call]
        else:
            messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
        is_open = messages[-1].role == "assistant"
    return messages
