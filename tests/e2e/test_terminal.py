"""`tandem chat`, `bench` and `top` as a user runs them: in a terminal, against a server with the embedded model."""

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tandem import Chat, SamplingParams, TandemClient
from tandem.processes import Services
from tandem_shared.config import SchedulerSettings, WorkerSettings

TANDEM = [sys.executable, "-m", "tandem.cli"]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with Services(WorkerSettings(port=0), SchedulerSettings(port=0, api_server_count=0)) as services:
        services.wait_until_ready(WAIT_S)
        yield services.address


def run_tandem(*arguments: str, status: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*TANDEM, *arguments], capture_output=True, text=True, timeout=WAIT_S, **options)  # type: ignore[call-overload]
    assert done.returncode == status, done.stderr
    return done


class Terminal:
    """A command in a pseudo-terminal, of which it is the foreground process."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="120", LINES="40")
            os.execv(sys.executable, [*TANDEM, *arguments])
        self._unread = ""

    def write(self, text: str) -> None:
        os.write(self._file, text.encode())

    def read_until(self, text: str) -> str:
        """What is shown up to a text, without the codes for colours and cursor."""
        deadline = time.monotonic() + WAIT_S
        while text not in self._unread:
            assert select.select([self._file], [], [], deadline - time.monotonic())[0], self._unread
            self._unread += re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", os.read(self._file, 65536).decode())
        before, _, self._unread = self._unread.partition(text)
        return before.replace("\r", "")

    def wait(self) -> int:
        while True:
            try:
                if not os.read(self._file, 65536):
                    break
            except OSError:
                # Linux ends a pseudo-terminal without processes with EIO.
                break
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_goes_on_after_an_interrupt(address: str) -> None:
    terminal = Terminal(
        "chat", "--address", address, "--system", "Answer.", "--temperature", "0", "--max-tokens", "400"
    )
    terminal.read_until("> ")
    terminal.write("Who are you?\n")
    with TandemClient(address) as client:
        deadline = time.monotonic() + WAIT_S
        while not client.load().num_output_tokens:
            assert time.monotonic() < deadline
        terminal.write("\x03")
        terminal.read_until("stopped")
        while client.load().num_running_sequences:
            assert time.monotonic() < deadline
        terminal.read_until("> ")
        terminal.write("/reset\n")
        terminal.read_until("a new conversation")
        terminal.read_until("> ")
        terminal.write("Speak\n")
        terminal.read_until("Speak\r\n")
        messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Speak"}]
        expected = client.generate(Chat(messages), SamplingParams(temperature=0.0, max_tokens=400)).choices[0].text
    assert terminal.read_until("> ").strip() == expected.strip()
    terminal.write("/quit\n")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_a_chat_serves_a_model_of_its_own(tmp_path: Path) -> None:
    terminal = Terminal("chat", "embedded", "--max-num-seqs", "4", "--max-tokens", "5")
    terminal.read_until("> ")
    terminal.write("Who are you?\n")
    terminal.read_until("> ")
    terminal.write("\x04")
    assert terminal.wait() == 0


def test_top_shows_a_load_until_it_is_interrupted(address: str) -> None:
    with TandemClient(address) as client:
        terminal = Terminal("top", "--address", address, "--interval-s", "0.2")
        stream = client.generate_stream("x", SamplingParams(max_tokens=1500, ignore_eos=True))
        next(stream)
        terminal.read_until("1 running, 0 waiting")
        terminal.read_until("% busy")
        stream.close()  # type: ignore[attr-defined]
        terminal.read_until("0 running, 0 waiting")
        terminal.write("\x03")
        assert terminal.wait() == 130


def test_bench_counts_what_the_server_counts(address: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    flags = "--num-prompts 6 --num-warmups 0 --request-rate 20 inf --random-input-len 5-9 --random-output-len 4"
    with TandemClient(address) as client:
        before = client.load()
        done = run_tandem("bench", "--address", address, *flags.split(), "--out", str(out))
        after = client.load()
    report = json.loads(out.read_text())
    assert [rate["rate"] for rate in report["rates"]] == ["20.0", "inf"]
    for rate in report["rates"]:
        assert rate["num_completed"] == 6 and rate["errors"] == {}
        assert rate["output_tok_s"] * rate["elapsed_s"] == pytest.approx(24, rel=0.01)
        assert 0 < rate["ttft_ms"]["p50"] <= rate["e2e_ms"]["p50"]
    assert after.num_output_tokens - before.num_output_tokens == 48
    assert 60 <= after.num_prompt_tokens - before.num_prompt_tokens <= 108
    assert "TTFT" in done.stdout


GAP_S = 0.04


class Stub(BaseHTTPRequestHandler):
    """A server with OpenAI's API that sends five tokens as four messages with a pause before each."""

    requests: ClassVar[list[dict[str, Any]]] = []
    lock = threading.Lock()
    num_open = most_open = 0

    def do_GET(self) -> None:
        self._begin()
        self.wfile.write(b'{"data": [{"id": "some-model"}]}')

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append(
            {**request, "path": self.path, "key": self.headers.get("authorization"), "at": time.monotonic()}
        )
        if len(self.requests) == 1:
            self.send_error(503, "not yet")
            return
        self._begin()
        with self.lock:
            Stub.num_open += 1
            Stub.most_open = max(self.most_open, self.num_open)
        if "messages" in request:
            self._event(b'{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}')
        for _ in range(4):
            time.sleep(GAP_S)
            text = b'"delta": {"reasoning_content": "x"}' if "messages" in request else b'"text": "x"'
            self._event(b'{"choices": [{%s, "finish_reason": null}], "usage": null}' % text)
        with self.lock:
            Stub.num_open -= 1
        # The pieces of an event may be apart.
        self.wfile.write(b'data: {"choices": [{"text": "", "finish_reason": "length"}]')
        self.wfile.flush()
        self.wfile.write(b"}\n\n")
        self._event(b'{"choices": [], "usage": {"completion_tokens": 5}}')
        self._event(b"[DONE]")

    def _begin(self) -> None:
        self.send_response(200)
        self.end_headers()

    def _event(self, data: bytes) -> None:
        self.wfile.write(b"data: " + data + b"\n\n")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stub_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_bench_measures_any_server_of_openais_api(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    flags = "--num-prompts 11 --num-warmups 0 --request-rate 40 --random-input-len 7 --random-output-len 5 --clients 1"
    with stub_server() as url:
        environment = {**os.environ, "OPENAI_API_KEY": "secret"}
        done = run_tandem(
            "bench", "--base-url", f"{url}/v1", *flags.split(), "--out", str(out), status=1, env=environment
        )
    assert "1 requests failed" in done.stderr and "HTTP 503" in done.stderr
    [rate] = json.loads(out.read_text())["rates"]
    assert rate["num_completed"] == 10 and sum(rate["errors"].values()) == 1
    assert rate["output_tok_s"] * rate["elapsed_s"] == pytest.approx(50, rel=0.01)
    # The machine may be busy, so that all takes longer, but nothing can be quicker.
    assert rate["ttft_ms"]["p50"] >= 1e3 * GAP_S and rate["itl_ms"]["p50"] == pytest.approx(1e3 * GAP_S, rel=0.5)
    assert rate["tpot_ms"]["p50"] == pytest.approx(rate["itl_ms"]["p50"] * 3 / 4, rel=0.3)
    first = Stub.requests[0]
    assert (first["model"], first["key"], first["ignore_eos"]) == ("some-model", "Bearer secret", True)
    assert len({str(request["prompt"]) for request in Stub.requests}) == 11
    assert all(len(request["prompt"]) == 7 for request in Stub.requests)
    times = [float(str(request["at"])) for request in Stub.requests]
    assert times[-1] - times[0] > 0.05


@pytest.mark.parametrize("flag", ["--backend openai-chat", "--endpoint /v1/chat/completions"])
def test_bench_asks_for_chats_and_for_few_at_once(flag: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    flags = "--num-prompts 8 --max-concurrency 3 --clients 2 --num-warmups 0 --random-input-len 6 --random-output-len 5"
    Stub.requests[:], Stub.most_open = [{}], 0
    with stub_server() as url:
        run_tandem("bench", "--base-url", url, *flag.split(), *flags.split(), "--out", str(out))
    asked = Stub.requests[1:]
    assert {request["path"] for request in asked} == {"/v1/chat/completions"} and 1 <= Stub.most_open <= 3
    contents = [request["messages"][0]["content"] for request in asked]
    assert len(set(contents)) == 8 and all(len(content.split()) == 6 for content in contents)
    assert all(request["max_completion_tokens"] == 5 and "prompt" not in request for request in asked)
    [rate] = json.loads(out.read_text())["rates"]
    assert rate["num_completed"] == 8 and rate["output_tok_s"] * rate["elapsed_s"] == pytest.approx(40, rel=0.01)
    # The message with the role has no token.
    assert rate["ttft_ms"]["p50"] >= 1e3 * GAP_S and rate["tokens_per_message"]["mean"] == 5 / 4
    # The last of 8 requests is sent after two others in its place, and is due no earlier.
    assert rate["elapsed_s"] >= 3 * 4 * GAP_S > rate["lateness_ms"]["p50"] / 1e3


def test_a_server_that_is_not_there_is_said_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"--base-url http://127.0.0.1:{port}"
    for server in (url, f"{url} --model m", f"--address 127.0.0.1:{port}"):
        done = run_tandem("bench", *server.split(), "--num-warmups", "0", "--num-prompts", "1", status=1)
        assert "refused" in done.stderr.lower() and "Traceback" not in done.stderr, done.stderr
