"""`tandem chat` with a server that says what the test wants: what it is asked, and what the terminal shows."""

from collections.abc import Iterator
from typing import Any

import pytest

from tandem.chat import Chat
from tandem.commands.conversation import Conversation
from tandem.sampling_params import SamplingParams
from tandem.v1 import inference_pb2
from tandem_shared.errors import QueueFull

Piece = str | BaseException


class Server:
    """Answers each conversation with the next of some lists of pieces. A piece that is an exception is raised."""

    def __init__(self, *answers: list[Piece], has_chat_template: bool = True) -> None:
        self._answers = list(answers)
        self._has_chat_template = has_chat_template
        self.asked: list[Chat] = []
        self.num_closed = 0

    def model_info(self) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(model="m", has_chat_template=self._has_chat_template)

    def generate_stream(self, chat: Chat, params: SamplingParams) -> Iterator[inference_pb2.GenerateStreamResponse]:
        self.asked.append(chat)
        try:
            for piece in self._answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield inference_pb2.GenerateStreamResponse(text_delta=piece)
            yield inference_pb2.GenerateStreamResponse(finish=inference_pb2.Finish())
        finally:
            self.num_closed += 1


def talk(monkeypatch: pytest.MonkeyPatch, server: Server, *lines: Piece, thinking: bool | None = None) -> None:
    left: list[Any] = [*lines, EOFError()]

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    Conversation(server, SamplingParams(), "be brief", thinking).run()  # type: ignore[arg-type]


def turns(*texts: str, system: str | None = "be brief") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_conversation_is_what_was_said_without_what_was_thought(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(["<think>\nhm", "m</th", "ink>\n\nHi", " there"], ["<"], ["Fine."], ["New."])
    talk(
        monkeypatch, server, "hello", "less?", "/system be kind", "how?", "/reset", "", "/wat", "again", thinking=False
    )
    assert [chat.messages for chat in server.asked] == [
        turns("hello"),
        turns("hello", "Hi there", "less?"),
        turns("hello", "Hi there", "less?", "<", "how?", system="be kind"),
        turns("again", system="be kind"),
    ]
    assert all(chat.enable_thinking is False for chat in server.asked)
    shown = capsys.readouterr().out
    assert "hmm\n\nHi there\n<\n" in shown and "unknown command /wat" in shown and "think>" not in shown


def test_thinking_is_dim_and_control_characters_are_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    talk(monkeypatch, Server(["<think>so</think>", "[red] :smile: \x1b[2J\x07"]), "x", "/quit")
    shown = capsys.readouterr().out
    assert "\x1b[2mso\x1b[0m" in shown
    assert "[red] :smile: \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}" in shown


def test_an_interrupt_or_an_error_ends_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(["Once upon", KeyboardInterrupt()], ["<think>hm", KeyboardInterrupt()], [QueueFull("full")], ["b"])
    talk(monkeypatch, server, "tell", KeyboardInterrupt(), "more", "still there?", "yes?")
    assert server.asked[-1].messages == turns("tell", "Once upon", "yes?")
    assert server.num_closed == 4
    shown = capsys.readouterr().out
    assert shown.count("stopped") == 2 and "full" in shown


def test_a_model_without_a_template_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(monkeypatch, Server(has_chat_template=False))
    assert "has no chat template" in capsys.readouterr().out
