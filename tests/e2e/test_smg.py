"""The gateway SMG over two Tandems on a CPU, with the configuration that docs/deployment.md shows: chats of each kind,
prefixes that are found again, and one Tandem killed.

The Tandems serve the embedded model, but with a `top_k` of 1 as the model's default: so a request is greedy unless it
says otherwise, and the tests see who fills in defaults.
"""

import contextlib
import http.client
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tandem import SamplingParams, TandemClient
from tandem_shared.model_folder import EMBEDDED_MODEL, resolve_model
from tests.e2e.services import Engine, free_port
from tests.e2e.waiting import WAIT_S, wait_until

PROGRAM = Path(sys.executable).with_name("smg")
MODEL = "shakespeare"
WORDS = ["king", "queen", "thou", "love", "sword", "night", "crown", "Rome"]
QUESTION = [{"role": "user", "content": "Hello"}]
STREAM_TOKENS = 300
"""So many that on a busy machine too no stream ends before the last one has begun."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="the extra dev brings the gateway for Linux alone"),
]


class Gateway:
    """The gateway as an HTTP client sees it."""

    def __init__(self, engines: list[Engine], port: int) -> None:
        self.engines = engines
        self.port = port

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The response, open. Raises HTTPError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"model": MODEL, **body}).encode(),
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=WAIT_S)

    def chat(self, **fields: Any) -> dict[str, Any]:
        with self.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 12, **fields}) as response:
            reply: dict[str, Any] = json.load(response)
        return reply

    def stream(self, **fields: Any) -> Iterator[dict[str, Any]]:
        body = {"messages": QUESTION, "max_tokens": 12, "stream": True, **fields}
        with self.post("/v1/chat/completions", body) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield json.loads(line.removeprefix(b"data: "))

    def answers(self) -> bool:
        try:
            return bool(self.chat())
        except (urllib.error.URLError, ConnectionError):
            return False


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / MODEL
    shutil.copytree(resolve_model(EMBEDDED_MODEL, []), folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "do_sample": True, "top_k": 1}))
    return folder


@pytest.fixture
def gateway(model_folder: Path, tmp_path: Path) -> Iterator[Gateway]:
    engines: list[Engine] = []
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2):
            flags = ["--vllm-engine-service", "true", "--tokenizer", str(model_folder)]
            engines.append(Engine(model_folder, dtype="float64", scheduler_flags=flags))
        port, log = free_port(), tmp_path / "smg.log"
        command = [str(PROGRAM), "launch", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(free_port()), "--health-check-interval-secs", "1"]
        command += ["--worker-urls", *(f"grpc://{engine.scheduler.address}" for engine in engines)]
        with log.open("wb") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path))
        gateway = Gateway(engines, port)
        wait_until(gateway.answers, "the gateway answers")
        yield gateway
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_S)
        for engine in engines:
            engine.close()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(model_folder)


def truth(gateway: Gateway, tokenizer: Any, **params: Any) -> Any:
    """What a Tandem says itself to the conversation, rendered by transformers."""
    ids = tokenizer.apply_chat_template(QUESTION, tokenize=True, return_dict=False, add_generation_prompt=True)
    with TandemClient(gateway.engines[0].scheduler.address) as client:
        return client.generate(ids, SamplingParams(**{"temperature": 0, "max_tokens": 12, **params}))


def test_chats_are_those_of_tandem(gateway: Gateway, tokenizer: Any) -> None:
    known = truth(gateway, tokenizer)
    # The gateway fills in the model's own top_k, and a user may turn it off.
    reply = gateway.chat(temperature=1)
    assert reply["choices"][0]["message"]["content"] == known.choices[0].text
    assert reply["usage"]["prompt_tokens"] == known.usage.num_prompt_tokens
    assert reply["usage"]["completion_tokens"] == known.usage.num_output_tokens
    others = {
        gateway.chat(temperature=1.5, top_k=-1, seed=seed)["choices"][0]["message"]["content"] for seed in range(4)
    }
    assert len(others) > 1

    messages = list(gateway.stream(stream_options={"include_usage": True}))
    deltas = [choice["delta"].get("content") or "" for message in messages for choice in message["choices"]]
    assert "".join(deltas) == known.choices[0].text and sum(map(bool, deltas)) > 3
    assert messages[-1]["usage"] == reply["usage"] | {
        "prompt_tokens_details": messages[-1]["usage"]["prompt_tokens_details"]
    }

    # The stop string spans tokens, and the output ends in the engine, not in the gateway alone.
    stop = known.choices[0].text[6:11]
    stopped = gateway.chat(stop=[stop])["choices"][0]
    assert stopped["message"]["content"] == known.choices[0].text[: known.choices[0].text.index(stop)]
    assert (stopped["finish_reason"], stopped["matched_stop"]) == ("stop", stop)

    seed = -7
    sampled = truth(gateway, tokenizer, temperature=1, top_k=-1, seed=2**64 + seed)
    reply = gateway.chat(temperature=1, top_k=-1, seed=seed, n=2)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert reply["choices"][0]["message"]["content"] == sampled.choices[0].text

    known = truth(gateway, tokenizer, logprobs=2)
    tokens = gateway.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in tokens] == pytest.approx([each.logprob for each in known.choices[0].logprobs])
    assert all(len(each["top_logprobs"]) == 2 for each in tokens)

    schema = {
        "type": "object",
        "properties": {"age": {"enum": [1, 2]}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    reply = gateway.chat(response_format=form, max_tokens=100)
    assert json.loads(reply["choices"][0]["message"]["content"])["age"] in (1, 2)

    with pytest.raises(urllib.error.HTTPError) as caught:
        gateway.chat(max_tokens=1_000_000)
    assert caught.value.code == 400 and b"stopping.max_tokens" in caught.value.read()


def question(number: int) -> list[dict[str, str]]:
    """The gateway sends questions with a common start to the server that has seen it, so these have none."""
    return [{"role": "user", "content": f"{number} {WORDS[number]} " * 30}]


class LongStream:
    """A stream that a thread reads, so that a test can act while it runs."""

    def __init__(self, gateway: Gateway, number: int) -> None:
        self._gateway = gateway
        self._question = question(number)
        self.text = ""
        self.finish_reason: str | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        # A stream that breaks has no finish reason.
        with contextlib.suppress(OSError, http.client.HTTPException):
            for message in self._gateway.stream(messages=self._question, max_tokens=STREAM_TOKENS, ignore_eos=True):
                for choice in message.get("choices", []):
                    self.text += choice["delta"].get("content") or ""
                    self.finish_reason = choice["finish_reason"] or self.finish_reason

    def join(self) -> tuple[str, str | None]:
        self._thread.join(2 * WAIT_S)
        assert not self._thread.is_alive()
        return self.text, self.finish_reason


def start_streams(gateway: Gateway) -> list[LongStream]:
    """Streams that all have begun, of which each Tandem has some."""
    for _ in range(3):
        streams = [LongStream(gateway, number) for number in range(len(WORDS))]
        wait_until(lambda streams=streams: all(stream.text for stream in streams), "all have begun")
        if all(engine.load().num_running_sequences for engine in gateway.engines):
            return streams
        # On a busy machine one Tandem may be done before the other one has begun.
        for stream in streams:
            stream.join()
    raise AssertionError("a Tandem has no streams while the other one has")


def test_prefixes_go_where_they_are_cached(gateway: Gateway) -> None:
    """With the gateway's default policy. It shares out what is new by load, so the first requests run side by side; a
    random choice would miss about half of the second ones."""
    for stream in start_streams(gateway):
        stream.join()
    for number in range(len(WORDS)):
        usage = gateway.chat(messages=question(number), max_tokens=1)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"] > 80


def test_a_killed_worker_costs_nothing(gateway: Gateway) -> None:
    known = [stream.join() for stream in start_streams(gateway)]
    assert all(text and reason == "length" for text, reason in known)
    streams = start_streams(gateway)
    gateway.engines[0].worker.serving().kill()
    assert [stream.join() for stream in streams] == known
    assert [engine.load().num_worker_losses for engine in gateway.engines] == [1, 0]


def test_a_killed_tandem_costs_its_own_streams_alone(gateway: Gateway) -> None:
    killed, other = gateway.engines
    known = [stream.join() for stream in start_streams(gateway)]
    streams = start_streams(gateway)
    num_safe = other.load().num_running_sequences
    killed.scheduler.kill()
    ends = [stream.join() for stream in streams]
    whole = [end for end, truth in zip(ends, known, strict=True) if end == truth]
    assert len(whole) >= num_safe > 0
    # What a broken stream has given is right, and its end is not told as if it were one.
    for (text, reason), (truth, _) in zip(ends, known, strict=True):
        assert truth.startswith(text) and (reason is None or text == truth)
    # The gateway tries another server, so requests that come now all succeed.
    assert all(gateway.chat()["choices"][0]["message"]["content"] for _ in range(20))
    killed.scheduler.start()
    killed.connect()
    before = killed.load().num_prompt_tokens

    def is_used_again() -> bool:
        gateway.chat(messages=[{"role": "user", "content": f"{before} {killed.load().num_steps} again"}])
        return bool(killed.load().num_prompt_tokens > before)

    wait_until(is_used_again, "the gateway uses the server that came back")
