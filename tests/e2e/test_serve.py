"""The services as child processes: which settings and signals reach them, and how they are stopped."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from tandem import SamplingParams, TandemClient, processes
from tandem.processes import ServiceFailed, Services
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.host.private_folder import LOCK_NAME, PrivateFolder
from tandem_shared.rpc.health_probe import health_status
from tests.e2e.services import WORKER, serving_process
from tests.e2e.waiting import wait_until

STARTUP_TIMEOUT_S = 60.0


def test_variables_change_nothing_that_was_set_for_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    # The services run with the defaults of both settings, which are not given to them as flags.
    monkeypatch.setenv("TANDEM_HOST", "0.0.0.0")
    monkeypatch.setenv("TANDEM_BLOCK_SIZE", "32")
    with Services(WorkerSettings(port=0), SchedulerSettings(port=0)) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        with TandemClient(services.address) as client:
            assert client.load().block_size_tokens == 16
        for process in (services.worker, services.scheduler):
            assert process is not None
            # The front ends may be processes below the scheduler's.
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            connections = [connection for each in tree for connection in each.net_connections()]
            listening = [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]
            assert listening and all(ip.removeprefix("::ffff:") == "127.0.0.1" for ip in listening)


def test_stopping_lets_running_requests_end_within_the_drain_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    # Then the drain grace is all the time that the scheduler has.
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 0.0)
    token_ids: list[int] = []
    has_begun = threading.Event()

    def read(client: TandemClient) -> None:
        try:
            for delta in client.generate_stream("ROMEO:\n", SamplingParams(max_tokens=300, ignore_eos=True)):
                token_ids.extend(delta.token_ids)
                has_begun.set()
        finally:
            has_begun.set()

    with Services(WorkerSettings(port=0), SchedulerSettings(port=0, drain_grace_s=60.0)) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        scheduler = services.scheduler
        with TandemClient(services.address) as client:
            reader = threading.Thread(target=read, args=[client])
            reader.start()
            has_begun.wait(STARTUP_TIMEOUT_S)
            services.stop()
            reader.join()
    assert len(token_ids) == 300
    assert scheduler is not None and scheduler.returncode == 0


def test_a_worker_that_never_listens_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    before = psutil.Process().children()
    services = Services(WorkerSettings(port=0), SchedulerSettings(port=0), None, ["hanging"], start_timeout_s=0.5)
    with pytest.raises(ServiceFailed, match=r"hanging does not listen after 0\.5 s"):
        services.__enter__()
    assert psutil.Process().children() == before


def test_a_killed_worker_is_back_at_the_same_address() -> None:
    """The Services object need not do anything for that."""
    with Services(WorkerSettings(port=0), SchedulerSettings(port=0)) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        assert services.worker is not None
        first = serving_process(services.worker.pid)
        first.kill()
        wait_until(lambda: health_status(services.worker_address, WORKER) == "SERVING", "the next worker")
        services.check_alive()
        assert serving_process(services.worker.pid) != first


def test_folders_of_services_that_were_killed_are_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = (
        "from tandem_shared.config import *; from tandem.processes import Services; import os, signal\n"
        "with Services(WorkerSettings(port=0, tp_size=2), SchedulerSettings(port=0, api_server_count=1)):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=STARTUP_TIMEOUT_S)
    assert done.returncode == -signal.SIGKILL
    # One folder each of the services, the front ends and the ranks.
    left = set(tmp_path.glob("tandem-*"))
    assert len(left) == 3
    wait_until(lambda: not any(is_used(folder) for folder in left), "the end of all processes")
    with PrivateFolder() as folder:
        assert list(tmp_path.glob("tandem-*")) == [folder]


def is_used(folder: Path) -> bool:
    with (folder / LOCK_NAME).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_a_terminated_demo_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tandem.cli", "demo"], stdout=subprocess.PIPE, text=True, env=environment
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("worker at "):
                break
        children = psutil.Process(demo.pid).children()
        demo.send_signal(signal.SIGTERM)
        demo.stdout.read()
    assert demo.returncode == 130
    assert len(children) == 2
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == []


def test_generate_gives_text_on_stdout_and_its_speed_on_stderr() -> None:
    with Services(WorkerSettings(port=0), SchedulerSettings(port=0)) as services:
        services.wait_until_ready(STARTUP_TIMEOUT_S)
        arguments = ["generate", "ROMEO:\n", "--address", services.address, "--temperature", "0", "--ignore-eos"]
        for max_tokens in (1, 12):
            done = subprocess.run(
                [sys.executable, "-m", "tandem.cli", *arguments, "--max-tokens", str(max_tokens)],
                capture_output=True,
                text=True,
                timeout=STARTUP_TIMEOUT_S,
            )
            with TandemClient(services.address) as client:
                params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
                expected = client.generate("ROMEO:\n", params).choices[0].text
            assert (done.returncode, done.stdout) == (0, expected + "\n")
            assert re.match(rf"{max_tokens} tokens: TTFT \d+\.\d ms", done.stderr)
