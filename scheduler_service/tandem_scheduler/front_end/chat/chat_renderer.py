"""Turns conversations into text by the model's chat template, in processes that can be killed.

Short conversations have a process of their own, so that none waits for a long one. A process starts with the first
conversation that it is to render, and again after it was killed.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import sys
from typing import Any

from tandem_scheduler.front_end.chat.renderer_protocol import EXHAUSTED, KWARGS, LENGTH, READY, REFUSED, TEXT
from tandem_scheduler.front_end.chat.template_folder import ChatTemplates
from tandem_scheduler.front_end.generation_params import Chat
from tandem_shared.errors import FieldViolation, InvalidRequest, QueueFull, TextFailed
from tandem_shared.host.process import child_environment

MODULE = "tandem_scheduler.front_end.chat.renderer_process"

MAX_MESSAGES = 4096
MAX_TOOLS = 1024
MAX_TOOL_CALLS = 1024
"""The limit of the tool calls of all messages together."""
MAX_CHARACTERS = 4 * 1024 * 1024
"""The limit of all texts of a conversation together."""
MAX_RENDERED_CHARACTERS = 2 * MAX_CHARACTERS
"""The longest text that a template may make of a conversation."""
MAX_ANSWER_BYTES = 4 * MAX_RENDERED_CHARACTERS + 1

SHORT_BYTES = 64 * 1024
"""Conversations up to this size, as they are sent to the process, are short."""
MESSAGES_AT_ONCE = 256
"""Messages that are read between two turns of the event loop."""
MAX_BYTES_AT_ONCE = 16 * 1024 * 1024
"""The limit of the conversations that wait for one process or are being rendered, all together."""

START_LIMIT_S = 30.0
"""A process that has not started after this time is killed."""
TIME_LIMIT_S = 5.0
"""The time that a rendering may take, by the clock: many times what Qwen3's template takes for as many and as long
messages as there may be (docs/performance-log.md, "chat templates in processes of their own")."""

logger = logging.getLogger(__name__)


class ChatRenderer:
    """The rendering of conversations, for all calls of a front end."""

    def __init__(self, templates: ChatTemplates | None, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        """templates: None if the model has none."""
        self.has_template = templates is not None
        # Long conversations are read one at a time, so that the event loop has its other turns in between.
        self._reading = asyncio.Lock()
        self._short, self._long = (_Process(templates, time_limit_s) for _ in range(2))

    async def render(self, field: str, chat: Chat) -> str:
        """The text of a conversation. `field` is the path of the conversation in the request. Raises InvalidRequest
        where the template or the API does not take it, QueueFull, and TextFailed where the template was killed.
        """
        if not self.has_template:
            raise _refusal(field, "the model has no chat template")
        is_long = len(chat.messages) > MESSAGES_AT_ONCE
        async with self._reading if is_long else contextlib.nullcontext():
            data = pickle.dumps((await _read_chat(field, chat), MAX_RENDERED_CHARACTERS))
        process = self._short if len(data) <= SHORT_BYTES else self._long
        kind, text = await process.render(data)
        if kind == TEXT:
            return text
        path, _, reason = text.partition("\n")
        raise _refusal(f"{field}{path}", reason)

    async def close(self) -> None:
        """Ends the processes."""
        for process in (self._short, self._long):
            await process.close()


class _Process:
    """One renderer's process. Conversations wait for their turn in the order in which they came."""

    def __init__(self, templates: ChatTemplates | None, time_limit_s: float) -> None:
        self._templates = templates
        self._time_limit_s = time_limit_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_bytes = 0
        self._is_closed = False

    async def render(self, data: bytes) -> tuple[bytes, str]:
        """The process's answer to a request: TEXT or REFUSED, and the text of it. Raises QueueFull and TextFailed."""
        if self._num_bytes + len(data) > max(len(data), MAX_BYTES_AT_ONCE):
            raise QueueFull("too many conversations are being rendered")
        self._num_bytes += len(data)
        try:
            await self._turn.acquire()
        except BaseException:
            self._num_bytes -= len(data)
            raise
        # If the caller is cancelled, the process still answers, and nobody else may take that answer for theirs.
        rendering = asyncio.create_task(self._render(data))
        rendering.add_done_callback(lambda _: self._leave(len(data)))
        rendering.add_done_callback(_note_outcome)
        return await asyncio.shield(rendering)

    def _leave(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._turn.release()

    async def _render(self, data: bytes) -> tuple[bytes, str]:
        reason = ""
        # A rendering changes nothing, so it may be done again if something killed the process.
        for _ in range(2):
            try:
                process = self._process = self._process or await self._start()
                async with asyncio.timeout(self._time_limit_s):
                    answer = await _exchange(process, data)
                if answer[:1] in (TEXT, REFUSED):
                    return answer[:1], str(memoryview(answer)[1:], "utf-8")
                reason = "needs too much memory" if answer == EXHAUSTED else "ended with no valid answer"
                break
            except TimeoutError:
                reason = f"took more than {self._time_limit_s:g} s"
                break
            except (EOFError, OSError, ValueError):
                reason = "failed: its process ended twice"
                await self._kill()
            except BaseException:
                # An answer that is still to come must not be taken for that of the next conversation.
                await self._kill()
                raise
        await self._kill()
        logger.error("the chat template %s", reason)
        raise TextFailed(f"the model's chat template {reason}")

    async def _start(self) -> asyncio.subprocess.Process:
        if self._is_closed:
            raise EOFError("the server is stopping")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            MODULE,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
        )
        self._process = process
        try:
            async with asyncio.timeout(START_LIMIT_S):
                is_ready = await _exchange(process, pickle.dumps(self._templates)) == READY
        except TimeoutError:
            is_ready = False
        if not is_ready:
            raise ValueError("the process does not start")
        return process

    async def close(self) -> None:
        """Ends the process, and no other is started."""
        self._is_closed = True
        await self._kill()

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _exchange(process: asyncio.subprocess.Process, data: bytes) -> bytes:
    """Sends a request and reads the answer. Raises OSError and EOFError if the process ends, ValueError for an answer
    that is longer than any.
    """
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    process.stdin.write(LENGTH.pack(len(data)))
    process.stdin.write(data)
    await process.stdin.drain()
    [length] = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    if length > MAX_ANSWER_BYTES:
        raise ValueError("the answer is too long")
    return await process.stdout.readexactly(length)


def _note_outcome(task: "asyncio.Task[tuple[bytes, str]]") -> None:
    """Reads a task's error, which nobody else does if the caller was cancelled."""
    if not task.cancelled():
        task.exception()


async def _read_chat(field: str, chat: Chat) -> dict[str, Any]:
    """The conversation as plain data of known size. Raises InvalidRequest."""
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        raise _refusal(f"{field}.messages", f"must be 1 to {MAX_MESSAGES}, are {len(chat.messages)}")
    if len(chat.tools) > MAX_TOOLS:
        raise _refusal(f"{field}.tools", f"must be {MAX_TOOLS} at most")
    tools = list(chat.tools)
    num_characters = len(chat.template_kwargs or "") + sum(map(len, tools))
    num_calls, messages = 0, []
    for index in range(len(chat.messages)):
        message = chat.messages[index]
        num_calls += len(message.tool_calls)
        if num_calls > MAX_TOOL_CALLS:
            raise _refusal(f"{field}.messages", f"must have {MAX_TOOL_CALLS} tool calls at most, all together")
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        texts: dict[str, str | None] = {
            "role": message.role,
            "content": message.content,
            "reasoning_content": message.reasoning_content,
            "tool_call_id": message.tool_call_id,
            "name": message.name,
        }
        every = [*texts.values(), *(text for call in calls for text in call.values())]
        num_characters += sum(len(text) for text in every if text)
        if num_characters > MAX_CHARACTERS:
            raise _refusal(field, f"must have {MAX_CHARACTERS} characters at most, all texts together")
        messages.append({**texts, "tool_calls": calls})
        if index % MESSAGES_AT_ONCE == MESSAGES_AT_ONCE - 1:
            await asyncio.sleep(0)
    return {
        "messages": messages,
        "tools": tools,
        "add_generation_prompt": chat.add_generation_prompt,
        "enable_thinking": chat.enable_thinking,
        KWARGS: chat.template_kwargs,
        "continue_final_message": chat.continue_final_message,
    }


def _refusal(field: str, description: str) -> InvalidRequest:
    return InvalidRequest(FieldViolation(field, description))
