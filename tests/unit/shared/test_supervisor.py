"""The supervisor with a tiny child in place of a service: what it restarts, how it ends, and that the port stays."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.e2e.waiting import wait_until

CHILD = """
import os, signal, socket, sys, time
from pathlib import Path
from tandem_shared.host.supervisor import tell_supervisor

folder = Path(sys.argv[1])
port = int(sys.argv[sys.argv.index("--port") + 1]) if "--port" in sys.argv else 0
number = len(list(folder.glob("life*")))
# What this life is to do, or the last that is said.
lives = (folder / "lives").read_text().split()
life = lives[min(number, len(lives) - 1)]
if "exit-unready" not in life:
    with socket.create_server(("127.0.0.1", port)) as server:
        port = server.getsockname()[1]
    tell_supervisor(port)
if life == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if life == "orphan" and os.fork() == 0:
    # The orphan outlives its parent, and ends before the next life does.
    os.setsid()
    time.sleep(0.2)
    os._exit(0)
partial = folder / "partial"
partial.write_text(f"{os.getpid()} {port} {time.monotonic()}")
partial.rename(folder / f"life{number}")
if life == "stay" or life == "deaf":
    time.sleep(60)
elif life == "orphan":
    sys.exit(70)
elif life == "frozen":
    os.kill(os.getpid(), signal.SIGSTOP)
elif life == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    sys.exit(int(life.rpartition(":")[2]))
"""

SUPERVISOR = """
import logging, sys
from tandem_shared.host.supervisor import Supervisor
logging.basicConfig(level=logging.INFO)
names = ("min_backoff_s", "max_backoff_s", "stop_limit_s", "silence_limit_s")
limits = dict(zip(names, map(float, sys.argv[1].split(","))))
sys.exit(Supervisor("child", sys.argv[2:], **limits).run())
"""


class Family:
    """A supervisor, and the processes that it has started so far."""

    def __init__(self, folder: Path, lives: list[str], limits: str, prefix: list[str]) -> None:
        self.folder = folder
        (folder / "lives").write_text(" ".join(lives))
        (folder / "child.py").write_text(CHILD)
        command = [*prefix, sys.executable, "-c", SUPERVISOR, limits]
        self.process = subprocess.Popen(
            [*command, sys.executable, str(folder / "child.py"), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def lives(self) -> list[tuple[int, int, float]]:
        """The process id, port and start time of each process."""
        texts = [(self.folder / f"life{number}").read_text() for number in range(len(list(self.folder.glob("life*"))))]
        return [(int(pid), int(port), float(started)) for pid, port, started in map(str.split, texts)]

    def wait_lives(self, count: int) -> list[tuple[int, int, float]]:
        wait_until(lambda: len(list(self.folder.glob("life*"))) >= count, f"{count} lives", 20)
        return self.lives()

    def end(self) -> tuple[int, str]:
        _, log = self.process.communicate(timeout=20)
        return self.process.returncode, log


Start = Callable[..., Family]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    families = []

    def start(
        *lives: str,
        backoff_s: tuple[float, float] = (0.05, 0.2),
        stop_limit_s: float = 60.0,
        silence_limit_s: float = 60.0,
        prefix: Sequence[str] = (),
    ) -> Family:
        limits = f"{backoff_s[0]},{backoff_s[1]},{stop_limit_s},{silence_limit_s}"
        families.append(Family(tmp_path, list(lives), limits, list(prefix)))
        return families[-1]

    yield start
    for family in families:
        family.process.kill()
        family.process.communicate()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_whatever_fails_is_started_again_on_the_port_that_the_first_one_took(start: Start) -> None:
    family = start("exit:70", "killed", "exit:1", "exit:2", "exit:0")
    status, log = family.end()
    assert status == 0
    lives = family.lives()
    assert len(lives) == 5
    assert lives[0][1] > 0 and len({port for _, port, _ in lives}) == 1
    ends = ["ended with status 70", "was ended by signal 9", "ended with status 1", "ended with status 2"]
    assert re.findall(r"the child (.*); starting", log) == ends


def test_the_pause_before_a_restart_doubles_up_to_its_limit(start: Start) -> None:
    family = start(*["exit:70"] * 5, "exit:0", backoff_s=(0.05, 0.2))
    _, log = family.end()
    assert re.findall(r"again in (\S+) s", log) == ["0.05", "0.10", "0.20", "0.20", "0.20"]
    starts = [started for _, _, started in family.lives()]
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert all(pause >= least for pause, least in zip(pauses, [0.05, 0.1, 0.2, 0.2, 0.2], strict=True))


def test_wrong_settings_before_it_has_ever_served_end_the_supervisor(start: Start) -> None:
    family = start("exit-unready:2")
    status, log = family.end()
    assert status == 2
    assert len(family.lives()) == 1
    assert "the child ended with status 2 before it served" in log


def test_what_fails_before_it_has_ever_served_is_tried_three_times(start: Start) -> None:
    family = start("exit-unready:1")
    status, _ = family.end()
    assert status == 1
    assert len(family.lives()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_in_order(start: Start, number: signal.Signals) -> None:
    family = start("stay")
    [(pid, _, _)] = family.wait_lives(1)
    family.process.send_signal(number)
    assert family.end()[0] == 0
    assert is_gone(pid)
    assert len(family.lives()) == 1


def test_a_second_signal_kills_a_child_that_does_not_end(start: Start) -> None:
    family = start("deaf")
    [(pid, _, _)] = family.wait_lives(1)
    family.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert family.process.poll() is None and psutil.pid_exists(pid)
    family.process.send_signal(signal.SIGTERM)
    assert family.end()[0] == 128 + signal.SIGKILL
    assert is_gone(pid)


def test_a_child_that_does_not_end_is_killed_in_time(start: Start) -> None:
    family = start("deaf", stop_limit_s=0.3)
    [(pid, _, _)] = family.wait_lives(1)
    family.process.send_signal(signal.SIGTERM)
    status, log = family.end()
    assert status == 128 + signal.SIGKILL
    assert "has not ended in 0.3 s; killing it" in log
    assert is_gone(pid)


def test_a_child_that_falls_silent_is_killed_and_started_again(start: Start) -> None:
    family = start("frozen", "exit:0", silence_limit_s=1.0)
    status, log = family.end()
    assert status == 0
    assert len(family.lives()) == 2
    assert "the child has been silent for 2 s; killing it" in log


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_does_not_blame_its_child(start: Start) -> None:
    family = start("stay", silence_limit_s=2.0)
    family.wait_lives(1)
    family.process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)
    family.process.send_signal(signal.SIGCONT)
    # Longer than it takes to find one that is silent.
    time.sleep(4.0)
    family.process.send_signal(signal.SIGTERM)
    status, log = family.end()
    assert status == 0
    assert len(family.lives()) == 1
    assert "silent" not in log


def test_a_child_that_the_system_does_not_start_is_tried_three_times() -> None:
    supervise = "from tandem_shared.host.supervisor import Supervisor"
    code = f"import sys; {supervise}; sys.exit(Supervisor('child', ['/no/such']).run())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 71
    assert done.stderr.count("can't start the child: [Errno 2] No such file or directory: '/no/such'") == 3


def test_a_signal_during_the_pause_ends_the_supervisor(start: Start) -> None:
    family = start("exit:70", backoff_s=(60.0, 60.0))
    assert family.process.stderr is not None
    for line in family.process.stderr:
        if "again in 60.00 s" in line:
            break
    family.process.send_signal(signal.SIGTERM)
    # It is waited for 20 s at most.
    assert family.end()[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parents")
def test_a_killed_supervisor_takes_the_child_along(start: Start) -> None:
    family = start("stay")
    [(pid, _, _)] = family.wait_lives(1)
    family.process.kill()
    wait_until(lambda: is_gone(pid), "the child's end", 10)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans go to the supervisor on Linux")
def test_orphans_that_end_are_collected_and_are_not_taken_for_the_child(start: Start) -> None:
    family = start("orphan", "stay")
    wait_until(lambda: (family.folder / "life1").exists(), "the second life", 20)
    supervisor = psutil.Process(family.process.pid)
    wait_until(lambda: len(supervisor.children()) == 1, "the orphan is collected", 10)
    assert [child.pid for child in supervisor.children()] == [family.lives()[-1][0]]
    family.process.send_signal(signal.SIGTERM)
    assert family.end()[0] == 0


NEW_PID_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_make_namespaces() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NEW_PID_NAMESPACE, "true"], check=False).returncode == 0
    )


@pytest.mark.skipif(not can_make_namespaces(), reason="may not make process namespaces here")
def test_the_first_process_of_a_container_restarts_collects_and_ends_in_order(start: Start) -> None:
    """The kernel makes all orphans its children, and sends it no signal that it has no handler for."""
    family = start("orphan", "killed", "stay", prefix=NEW_PID_NAMESPACE)
    family.wait_lives(3)
    [supervisor] = psutil.Process(family.process.pid).children()
    wait_until(lambda: len(supervisor.children()) == 1, "the orphan is collected", 10)
    supervisor.send_signal(signal.SIGTERM)
    assert family.end()[0] == 0


def test_the_supervisor_of_a_worker_loads_nothing_large() -> None:
    code = (
        "import json, sys; import tandem_worker.__main__; "
        "print(json.dumps([m for m in ('torch', 'grpc', 'numpy', 'asyncio', 'google.protobuf') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
