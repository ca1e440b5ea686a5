"""A process that renders chat templates for its parent, chat_renderer.py, and nothing else.

A template is code from the model's folder. So the process has little memory and can open no files, and the parent kills
it when it takes too long. renderer_protocol.py says how the two speak.
"""

import pickle
import resource
import signal
import sys
from typing import Any, BinaryIO

from tandem_scheduler.front_end.chat.renderer_protocol import (
    EXHAUSTED,
    KWARGS,
    LENGTH,
    READY,
    REFUSED,
    TEXT,
)
from tandem_scheduler.front_end.chat.rendering import ChatRefused, Renderer
from tandem_scheduler.front_end.chat.template_folder import ChatTemplates
from tandem_shared.host.process import end_with_parent

MAX_MEMORY_BYTES = 512 * 1024 * 1024
"""The limit of the process's address space, on Linux. It is a multiple of what the longest conversations take with
Qwen3's template, or with one that writes each message twice."""

NO_CHAT: dict[str, Any] = {
    "messages": [],
    "tools": [],
    "add_generation_prompt": None,
    "enable_thinking": None,
    KWARGS: None,
    "continue_final_message": False,
}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    if sys.platform == "linux":
        end_with_parent(int(sys.argv[1]))
    # Imports that rendering would make later need files.
    warm_up = Renderer(ChatTemplates({"default": "{{ strftime_now('%d %b %Y') }}{{ nothing.at_all }}"}, {}))
    try_to_render(warm_up, NO_CHAT, 100)
    for limit, most in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    renderer: Renderer | None = None
    while (message := _read(requests)) is not None:
        if renderer is None:
            renderer = Renderer(pickle.loads(message))
            _write(answers, READY)
        else:
            _write(answers, try_to_render(renderer, *pickle.loads(message)))


def try_to_render(renderer: Renderer, chat: dict[str, Any], max_characters: int) -> bytes:
    """The answer to a request."""
    try:
        text = renderer.render(chat, max_characters)
        return TEXT + text.encode()
    except ChatRefused as error:
        return REFUSED + f"{error.path}\n{error.reason}".encode(errors="backslashreplace")
    except UnicodeEncodeError:
        return REFUSED + b"\nhas characters that are not Unicode text"
    except MemoryError:
        return EXHAUSTED


def _read(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def _write(stream: BinaryIO, message: bytes) -> None:
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


if __name__ == "__main__":
    main()
