"""What a chat asks of the scheduler, and how its output is read: for /v1/chat/completions and /v1/responses."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.structured_output import StructuredOutput
from tandem.v1 import inference_pb2
from tandem_gateway.conversation import chat_of
from tandem_gateway.engine import Engine, Fields, Metadata
from tandem_gateway.generation import form_of, request_fields
from tandem_gateway.output_parser import END_THINK, CallStart, Content, OutputParser, Piece, Reasoning
from tandem_gateway.problems import refuse
from tandem_gateway.protocol import ChatOptions, Message, NamedToolChoice
from tandem_gateway.tools import TAGS, after_thinking, calls_grammar


@dataclass(frozen=True)
class ChatPlan:
    fields: Fields
    """The gRPC request."""
    reasoning: str
    """How OutputParser is to look for reasoning."""
    has_tools: bool
    is_single_call: bool
    """Whether calls after the first are left out, as parallel_tool_calls=false wants it."""
    has_reasoning: bool
    """Whether reasoning is answered with, which include_reasoning=false keeps from it."""

    def reader(self) -> "OutputReader":
        """A reader of one choice's text."""
        parser = OutputParser(reasoning=self.reasoning, has_tools=self.has_tools)
        return OutputReader(parser, self.is_single_call, self.has_reasoning)


class OutputReader:
    """Reads one choice's text, and keeps what was found."""

    def __init__(self, parser: OutputParser, is_single_call: bool, has_reasoning: bool) -> None:
        self._parser = parser
        self._is_single_call = is_single_call
        self._has_reasoning = has_reasoning
        self.reasoning = ""
        self.content = ""
        self.calls: list[tuple[str, str]] = []
        """Name and arguments of each call."""

    def read(self, text: str, *, is_last: bool) -> list[Piece]:
        pieces = self._parser.feed(text)
        if is_last:
            pieces += self._parser.finish()
        kept = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                if not self._has_reasoning:
                    continue
                self.reasoning += piece.text
            elif isinstance(piece, Content):
                self.content += piece.text
            elif self._is_single_call and piece.index > 0:
                continue
            elif isinstance(piece, CallStart):
                self.calls.append((piece.name, ""))
            else:
                name, arguments = self.calls[piece.index]
                self.calls[piece.index] = (name, arguments + piece.text)
            kept.append(piece)
        return kept


async def plan_chat(
    engine: Engine,
    metadata: Metadata,
    options: ChatOptions,
    messages: Sequence[Message],
    request_id: str,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> ChatPlan:
    """Raises InvalidRequest for what can't be asked."""
    options.check_unknown()
    choice = options.tool_choice if options.tool_choice is not None else "auto"
    # A model that is not to call tools does not see them.
    seen = [] if choice == "none" else options.tools or []
    form = form_of(options)
    chat = chat_of(messages, seen, options)
    reasoning = engine.reasoning
    if reasoning == "opened" and _may_not_think(chat):
        reasoning = "think"
    if choice == "required" or isinstance(choice, NamedToolChoice):
        if form is not None:
            raise refuse("tool_choice", "can't demand a call where the output has another form")
        form = await _calls(engine, metadata, options, chat, reasoning)
    elif form is not None:
        thinking = await _thinking(engine, metadata, chat, reasoning)
        form = after_thinking(form, thinking=thinking)
    fields = request_fields(options, {"chat": chat}, request_id, max_tokens=max_tokens, logprobs=logprobs, form=form)
    is_single_call, has_reasoning = options.parallel_tool_calls is False, options.include_reasoning is not False
    return ChatPlan(fields, reasoning, bool(seen), is_single_call, has_reasoning)


async def _calls(
    engine: Engine, metadata: Metadata, options: ChatOptions, chat: inference_pb2.Chat, reasoning: str
) -> StructuredOutput:
    functions = [tool.function for tool in options.tools or ()]
    if isinstance(options.tool_choice, NamedToolChoice):
        name = options.tool_choice.function.name
        functions = [each for each in functions if each.name == name]
        if not functions:
            raise refuse("tool_choice", f"names {name[:100]!r}, which is not among the tools")
    elif not functions:
        raise refuse("tool_choice", "is required, but there are no tools")
    is_single = isinstance(options.tool_choice, NamedToolChoice) or options.parallel_tool_calls is False
    thinking = await _thinking(engine, metadata, chat, reasoning)
    tokens = await engine.tokens_among(TAGS, metadata)
    return calls_grammar(functions, is_single=is_single, thinking=thinking, tokens=tokens)


async def _thinking(engine: Engine, metadata: Metadata, chat: inference_pb2.Chat, reasoning: str) -> str:
    """Whether the output may begin with a thought: "no", "may", or "opened" if it begins within one."""
    if reasoning == "none" or _may_not_think(chat) or chat.continue_final_message:
        return "no"
    if END_THINK not in await engine.tokens_among(TAGS, metadata):
        return "no"
    return "opened" if reasoning == "opened" else "may"


def _may_not_think(chat: inference_pb2.Chat) -> bool:
    """Whether the conversation forbids it. Without the field, the model's template decides."""
    return chat.HasField("enable_thinking") and not chat.enable_thinking
