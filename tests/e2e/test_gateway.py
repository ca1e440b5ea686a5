"""OpenAI's own Python client against real services with the embedded model, and Qwen3's chat template."""

import json
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import psutil
import pytest

from tests.e2e.conftest import StartEngine
from tests.e2e.gateway import GatewayProcess, forced
from tests.e2e.services import Engine, free_port
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.chats import QWEN3_TEMPLATE
from tests.support.metrics import Scrape
from tests.support.tokenizers import EMBEDDED

MODEL = "embedded"
USER: Any = {"role": "user", "content": "How is the weather in Verona?"}
CITY = {"type": "string", "enum": ["Verona", "Zürich"]}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False,
        },
    },
}  # fmt: skip
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}
THOUGHT = "Is it the east, or Zürich?\n\n1 < 2"
ARGUMENTS = '{"city": "Zürich", "why": "{\\"}"}'
OUTPUT = (
    f"<think>\n{THOUGHT}\n</think>\n\nLet me look.\n"
    f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").symlink_to(EMBEDDED)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return start_engine("embedded", dtype="float32", scheduler_flags=["--tokenizer", str(folder)])


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    # vLLM's name of the default.
    flags = ["--reasoning-parser", "qwen3"]
    gateway = GatewayProcess(engine.scheduler.address, tmp_path_factory.mktemp("gateway"), *flags)
    yield gateway
    gateway.kill()
    print(gateway.log_file.read_text())


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


def test_reasoning_content_and_calls_are_found_in_an_output(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [USER],
        "tools": [WEATHER, CLOCK],
        "extra_body": forced(OUTPUT),
    }
    [choice] = client.chat.completions.create(**asked).choices
    message = choice.message
    assert choice.finish_reason == "tool_calls"
    assert (message.content, message.to_dict()["reasoning_content"]) == ("Let me look.", THOUGHT)
    calls = [
        (call.function.name, call.function.arguments) for call in message.tool_calls or () if call.type == "function"
    ]
    assert calls == [("get_weather", ARGUMENTS), ("get_time", "{}")]
    without = {**asked, "extra_body": {**asked["extra_body"], "include_reasoning": False}}
    bare = client.chat.completions.create(**without).choices[0].message
    assert bare.content == message.content and "reasoning_content" not in bare.to_dict()

    content = reasoning = ""
    streamed: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += delta.to_dict().get("reasoning_content", "")
        for call in delta.tool_calls or ():
            parts = streamed.setdefault(call.index, [])
            assert call.function is not None
            assert bool(call.id) == bool(call.function.name) == (not parts)
            parts += [call.function.name or "", call.function.arguments or ""]
    assert (content, reasoning) == (message.content, THOUGHT)
    assert [(parts[0], "".join(parts[1:])) for parts in streamed.values()] == calls
    assert chunk.choices[0].finish_reason == "tool_calls"


def test_without_tools_a_call_is_text(client: openai.OpenAI) -> None:
    text = OUTPUT.partition("</think>\n\n")[2]
    for tools in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        asked: dict[str, Any] = {"model": MODEL, "messages": [USER], "extra_body": forced(text), **tools}
        [choice] = client.chat.completions.create(**asked).choices
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (text, "stop", None)


@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_is_required_is_made(client: openai.OpenAI, seed: int) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": [USER], "tools": [WEATHER, CLOCK], "seed": seed, "max_tokens": 200,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "parallel_tool_calls": False,
    }  # fmt: skip
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        [answer] = client.chat.completions.create(**asked, tool_choice=choice).choices
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        [call] = answer.message.tool_calls or ()
        assert call.type == "function" and call.function.name in ("get_weather", "get_time")
        if call.function.name == "get_weather":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
        assert choice == "required" or call.function.name == "get_weather"


@pytest.mark.slow
def test_a_round_trip_of_a_tool_is_a_conversation(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER, CLOCK]}
    first = client.chat.completions.create(messages=[USER], extra_body=forced(OUTPUT), **asked).choices[0].message
    results: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in first.tool_calls or ()]
    answer = client.chat.completions.create(
        messages=[USER, first.to_dict(), *results], extra_body=forced("It is sunny."), **asked
    )
    assert answer.choices[0].message.content == "It is sunny."


def test_json_follows_its_schema_after_a_thought_or_without_one(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": CITY, "rain": {"type": "boolean"}}, "required": ["city", "rain"],
              "additionalProperties": False}  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    asked: dict[str, Any] = {"model": MODEL, "messages": [USER], "max_tokens": 120, "seed": 2}
    for extra in ({"chat_template_kwargs": {"enable_thinking": False}}, {"bad_words": ["<think>"]}):
        [choice] = client.chat.completions.create(**asked, response_format=form, extra_body=extra).choices
        assert choice.finish_reason == "stop" and choice.message.content
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_responses_have_items_and_events(client: openai.OpenAI) -> None:
    function = {"type": "function", **WEATHER["function"]}
    asked: dict[str, Any] = {
        "model": MODEL, "instructions": "Be brief.", "input": USER["content"], "tools": [function],
        "extra_body": forced(OUTPUT),
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert (whole.status, whole.output_text) == ("completed", "Let me look.")
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text == THOUGHT
    assert (whole.output[2].name, whole.output[2].arguments) == ("get_weather", ARGUMENTS)
    assert whole.usage is not None and whole.usage.output_tokens > 20

    def bare(items: Any) -> list[dict[str, Any]]:
        kept = ("type", "status", "role", "name", "arguments")
        return [{k: v for k, v in item.to_dict().items() if k in kept} for item in items]

    with client.responses.stream(**asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert bare(final.output) == bare(whole.output)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Let me look." and len(deltas) > 1
    arguments = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(arguments) == ARGUMENTS + "{}"

    calls = [item for item in whole.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
    conversation = [USER, *(item.to_dict() for item in whole.output), *results]
    second = client.responses.create(**{**asked, "input": conversation, "extra_body": forced("It is sunny.")})
    assert second.output_text == "It is sunny."
    short = client.responses.create(model=MODEL, input="Speak.", max_output_tokens=3, temperature=0)
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=MODEL, input="Go on.", previous_response_id=whole.id)


@pytest.mark.slow
def test_a_worker_killed_under_http_streams_loses_nothing(engine: Engine, client: openai.OpenAI) -> None:
    requests: list[dict[str, Any]] = [
        {"model": MODEL, "messages": [{**USER, "content": f"Speak of {thing}."}], "max_tokens": 150, "temperature": 0,
         "extra_body": {"ignore_eos": True}} for thing in ("love", "war", "the sea")
    ]  # fmt: skip
    truth = [client.chat.completions.create(**request).choices[0].message.content for request in requests]
    texts = ["" for _ in requests]
    begun = threading.Barrier(len(requests) + 1, timeout=60)

    def read(index: int) -> None:
        for number, chunk in enumerate(client.chat.completions.create(**requests[index], stream=True)):
            texts[index] += chunk.choices[0].delta.content or ""
            if number == 10:
                begun.wait()

    readers = [threading.Thread(target=read, args=[index]) for index in range(len(requests))]
    for reader in readers:
        reader.start()
    begun.wait()
    engine.worker.serving().kill()
    for reader in readers:
        reader.join(60)
    assert texts == truth
    assert engine.load().num_worker_losses >= 1


@pytest.mark.slow
def test_serve_has_http_and_starts_it_again(tmp_path: Path) -> None:
    port = free_port()
    log_file = tmp_path / "log"
    command = [sys.executable, "-m", "tandem.cli", "serve", "embedded", "--port", "0", "--http-port", str(port)]
    with log_file.open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: f"HTTP on http://127.0.0.1:{port}" in log_file.read_text(), "HTTP is on")
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=9) as client:
                assert client.completions.create(model=MODEL, prompt="ROMEO:", max_tokens=3).usage
                for child in psutil.Process(process.pid).children():
                    if "tandem_gateway" in child.cmdline():
                        child.kill()
                assert client.completions.create(model=MODEL, prompt="ROMEO:", max_tokens=3).usage
        finally:
            process.terminate()
            assert process.wait(WAIT_S) == 0, log_file.read_text()


@pytest.mark.slow
def test_several_processes_share_the_port_and_end_in_order(engine: Engine, tmp_path: Path) -> None:
    gateway = GatewayProcess(engine.scheduler.address, tmp_path, "--http-workers", "2")
    for _ in range(8):
        # Each client has a connection of its own, and the kernel chooses the process that gets it.
        with gateway.client() as client:
            assert client.completions.create(model=MODEL, prompt="ROMEO:", max_tokens=3).usage
    served = psutil.Process(gateway.process.pid).children()
    # Connections that come at once are dealt out: that a process has less than a fifth of 40 is once in 10,000 times.
    address = ("127.0.0.1", urllib.parse.urlsplit(gateway.url).port)
    connections = [socket.create_connection(address) for _ in range(40)]
    wait_until(lambda: sum(num_connections(process) for process in served) >= 40, "all have been accepted")
    assert sum(num_connections(process) >= 8 for process in served) == 2
    for connection in connections:
        connection.close()
    # Whichever process is asked tells of all of them, also of one that has been killed.
    assert num_completions(gateway) == 8
    for process in served:
        if "resource_tracker" not in " ".join(process.cmdline()):
            process.kill()
            break
    for _ in range(8):
        wait_until(lambda: num_completions(gateway) == 8, "it is served again, and nothing is forgotten")
    assert gateway.stop() == 0


def num_connections(process: psutil.Process) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in process.net_connections("tcp"))


def num_completions(gateway: GatewayProcess) -> float:
    """How many completions the gateway says that it has served. -1 if it does not answer."""
    try:
        with urllib.request.urlopen(f"{gateway.url}/metrics", timeout=WAIT_S) as response:
            found = Scrape(response.read().decode(), prefix="")
    except OSError:
        return -1
    return found.values("http_requests_total", "handler")["/v1/completions"]
