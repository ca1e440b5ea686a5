"""The command `tandem` and LLM as a user runs them, with real processes and the embedded model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tandem import LLM, SamplingParams, TandemClient
from tandem.v1.control_pb2 import WORKER_STATE_READY
from tandem_shared.errors import WorkerUnavailable
from tests.e2e.services import serving_process
from tests.e2e.waiting import WAIT_S, wait_until

TANDEM = [sys.executable, "-m", "tandem.cli"]


def run_tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TANDEM, *arguments], capture_output=True, text=True, timeout=90)


def test_the_demo_streams_text_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([*TANDEM, "demo"], stdout=subprocess.PIPE, text=True, env=environment) as demo:
        assert demo.stdout is not None
        output, children = "", {}
        for line in demo.stdout:
            output += line
            children |= {child.pid: child for child in psutil.Process(demo.pid).children()}
    assert demo.returncode == 0
    assert "ROMEO:\n" in output
    assert re.search(r"\n200 tokens: TTFT \d+\.\d ms, then \d+ tokens/s\n", output)
    assert len(children) == 2
    assert not any(child.is_running() for child in children.values())
    assert list(tmp_path.iterdir()) == []


@contextmanager
def serving(*flags: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Runs tandem serve with the embedded model; gives its process and the scheduler's address."""
    command = [*TANDEM, "serve", "embedded", "--port", "0", "--dtype", "float64", "--http-port", "0", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            address = ""
            for line in process.stderr:
                if match := re.search(rb"tandem serve: listening on (\S+)", line):
                    address = match[1].decode()
                    break
            assert address, "tandem serve ended"
            with TandemClient(address) as client:
                wait_until(lambda: client.server_info().worker_state == WORKER_STATE_READY, "the worker")
            yield process, address
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.close()
            process.wait(20)


@pytest.mark.slow
def test_serve_starts_a_killed_worker_again_and_the_stream_goes_on() -> None:
    params = SamplingParams(seed=1, max_tokens=400, ignore_eos=True)
    with serving() as (process, address), TandemClient(address) as client:
        undisturbed = list(client.generate("ROMEO:\n", params).choices[0].token_ids)
        client.reset_prefix_cache()
        stream = client.generate_stream("ROMEO:\n", params)
        token_ids = list(next(stream).token_ids)
        serving_process(process.pid).kill()
        for delta in stream:
            token_ids += delta.token_ids
        assert client.load().num_worker_losses == 1
        generated = run_tandem("generate", "ROMEO:\n", "--address", address, "--max-tokens", "5", "--temperature", "0")
        expected = client.generate("ROMEO:\n", SamplingParams(temperature=0.0, max_tokens=5)).choices[0].text
    assert token_ids == undisturbed
    assert (generated.returncode, generated.stdout) == (0, expected + "\n")
    assert process.returncode == 0


def test_killed_serve_takes_its_services_and_their_front_ends_along() -> None:
    with serving("--api-server-count", "2") as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        # The worker, its supervisor, the scheduler and its two front ends.
        assert len(children) == 5
        process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert not alive and len(gone) == 5


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        ([], 2, "the following arguments are required: command"),
        (["serve"], 2, "give a MODEL: a folder, a hub id, or 'embedded'"),
        (["serve", "embedded", "--block-size", "0"], 2, "--block-size must be at least 1, is 0"),
        (["serve", "embedded", "--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
        (["serve", "/no/such/model", "--port", "0"], 1, "/no/such/model: no such folder"),
        (["generate", "x", "--address", "127.0.0.1:1"], 1, "Is a server there? `tandem serve MODEL` starts one"),
    ],
)
def test_a_wrong_command_says_so(arguments: list[str], status: int, problem: str) -> None:
    done = run_tandem(*arguments)
    assert done.returncode == status
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_taken_port_is_noticed_before_anything_starts(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_tandem("serve", "embedded", "--port", "0", flag, str(port))
    assert done.returncode == 2
    assert done.stderr == (
        f"tandem serve: can't listen on 127.0.0.1:{port}; is another server there? {flag} names another port\n"
    )


def test_llm_leaves_nothing_behind() -> None:
    me = psutil.Process()
    before = set(me.children())
    with LLM("embedded", max_num_seqs=4) as llm:
        started = set(me.children()) - before
        assert llm.generate("JULIET:\n", SamplingParams(max_tokens=3))[0]["text"]
    assert len(started) == 2
    assert not set(me.children()) & started


@pytest.mark.slow
def test_llm_goes_on_when_its_worker_is_killed() -> None:
    params = SamplingParams(seed=1, max_tokens=300, ignore_eos=True)
    prompts = ["ROMEO:\n", "JULIET:\n"]
    with LLM("embedded", dtype="float64") as llm:
        undisturbed = [output["token_ids"] for output in llm.generate(prompts, params)]
        with ThreadPoolExecutor(1) as pool:
            outputs = pool.submit(llm.generate, prompts, params)
            wait_until(lambda: llm.client.load().num_running_sequences == 2, "both run")
            serving_process(os.getpid()).kill()
            assert [output["token_ids"] for output in outputs.result(WAIT_S)] == undisturbed
        assert llm.client.load().num_worker_losses == 1


INTERRUPTED = """
import time
from tandem import LLM, SamplingParams
with LLM("embedded", max_num_seqs=4) as llm:
    try:
        print("generating", flush=True)
        llm.generate(["A"] * 60, SamplingParams(max_tokens=2000, ignore_eos=True))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        deadline = time.monotonic() + 10
        while (load := llm.client.load()).num_running_sequences + load.num_waiting_sequences:
            assert time.monotonic() < deadline
        print("aborted", flush=True)
        raise
"""


def test_one_interrupt_ends_generate_and_aborts_its_requests() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "generating\n"
            # All sixty would take minutes. Some of them run by now.
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - started < 10
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert output == "aborted\n"
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_to_serve_ends_its_drain(number: signal.Signals) -> None:
    with serving("--drain-grace-s", "600") as (process, address), TandemClient(address) as client:
        stream = client.generate_stream("ROMEO:\n", SamplingParams(max_tokens=2000, ignore_eos=True))
        next(stream)
        process.send_signal(number)
        wait_until(lambda: client.server_info().draining, "the drain")
        process.send_signal(number)
        with pytest.raises(WorkerUnavailable, match="the server is stopping"):
            list(stream)
        assert process.wait(20) == 0


def test_the_scheduler_never_loads_torch() -> None:
    code = (
        "import sys; import tandem_scheduler.__main__, tandem_scheduler.service, tandem.client; "
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
