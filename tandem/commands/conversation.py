"""A conversation in a terminal: lines are read, answers are shown while they arrive, what the model thinks is dim."""

import contextlib
import sys
from typing import Any

import grpc
from rich.console import Console

from tandem.chat import Chat
from tandem.client import TandemClient
from tandem.commands.thinking import ThinkingSplitter
from tandem.outputs import text_of
from tandem.sampling_params import SamplingParams
from tandem_shared.errors import TandemError

PROMPT = "> "
HELP = "/system TEXT sets the system message, /reset begins anew, /quit or Ctrl-D ends; Ctrl-C stops an answer"
CONTROL_CHARACTERS = dict.fromkeys((*range(32), *range(127, 160)), "�") | {
    9: "\t",
    10: "\n",
}
"""A model's text must not move the terminal's cursor, or worse."""


class Conversation:
    """The messages so far, and the terminal they are shown in."""

    def __init__(
        self, client: TandemClient, params: SamplingParams, system: str | None, enable_thinking: bool | None
    ) -> None:
        self._client = client
        self._params = params
        self._system = system
        self._enable_thinking = enable_thinking
        self._messages: list[dict[str, Any]] = []
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def run(self) -> None:
        """Returns when the user ends the conversation. Raises what the client raises for a server that is not there."""
        model = self._client.model_info()
        self._note(f"{model.model}. {HELP}")
        if not model.has_chat_template:
            self._note("This model has no chat template, so it can't chat: use tandem generate.")
            return
        # Lines can then be edited, and earlier ones come back.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        while True:
            try:
                line = input(PROMPT).strip()
            except KeyboardInterrupt:
                print()
                self._note(HELP)
            except EOFError:
                print()
                return
            else:
                if line == "/quit":
                    return
                self._take(line)

    def _take(self, line: str) -> None:
        command, _, text = line.partition(" ")
        if command == "/reset":
            self._messages.clear()
            self._note("a new conversation")
        elif command == "/system":
            self._system = text.strip() or None
            self._note("the system message is set" if self._system else "there is no system message")
        elif command.startswith("/"):
            self._note(f"unknown command {command}. {HELP}")
        elif line:
            self._ask(line)

    def _ask(self, line: str) -> None:
        """Shows the answer to a line. Line and answer become part of the conversation, unless there is no answer."""
        question = {"role": "user", "content": line}
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer: list[str] = []
        try:
            chat = Chat([*system, *self._messages, question], enable_thinking=self._enable_thinking)
            self._show(chat, answer)
            print()
        except KeyboardInterrupt:
            print()
            self._note("stopped")
        except (TandemError, grpc.RpcError) as error:
            print()
            self._note(f"{text_of(error)}", style="red")
        if text := "".join(answer).strip():
            self._messages += [question, {"role": "assistant", "content": text}]

    def _show(self, chat: Chat, answer: list[str]) -> None:
        """Streams an answer to the terminal. What is no thinking is added to the list, so that it is there if the
        stream is interrupted.
        """
        splitter = ThinkingSplitter()
        was_thinking = False
        stream = self._client.generate_stream(chat, self._params)
        with contextlib.closing(stream):  # type: ignore[type-var]
            for delta in stream:
                pieces = [*splitter.feed(delta.text_delta), *(splitter.end() if delta.HasField("finish") else ())]
                for is_thinking, text in pieces:
                    if was_thinking and not is_thinking:
                        print("\n")
                    was_thinking = is_thinking
                    if not is_thinking:
                        answer.append(text)
                    shown = text.translate(CONTROL_CHARACTERS)
                    self._console.print(shown, end="", style="dim" if is_thinking else "")
                    sys.stdout.flush()

    def _note(self, text: str, style: str = "italic") -> None:
        self._console.print(text, style=style)
