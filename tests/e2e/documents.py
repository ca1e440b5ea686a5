"""The code blocks of README.md and docs, and a machine to run them on as they stand.

A machine is a network namespace in which only what a test starts listens, so that documented addresses are right. Its
working folder has models under the documented names: links to the embedded model, which the hub's cache has too.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem_shared.model_folder import resolve_model
from tests.e2e.hosts import entering, network_namespaces
from tests.e2e.services import REPOSITORY
from tests.e2e.waiting import WAIT_S, wait_until

COMMENT = re.compile(r"(^|\s+)# .*")
HUB_ID = "Qwen/Qwen3-0.6B"
COMMIT = "0" * 40
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PROBE = "python -m tandem_shared.rpc.health_probe"
READY = {
    "tandem serve": f"{PROBE} 127.0.0.1:50051 tandem.v1.InferenceService && curl -s http://127.0.0.1:8000/health",
    "tandem-scheduler": f"{PROBE} 127.0.0.1:50051 tandem.v1.InferenceService",
    "tandem-worker": f"{PROBE} 127.0.0.1:50052 tandem.internal.v1.WorkerService",
    "tandem-gateway": "curl -s http://127.0.0.1:8001/health",
}
"""The beginning of a command that serves until it is stopped -> a command that succeeds once it can be used."""


@dataclass(frozen=True)
class Block:
    """A fenced block. Without a language it holds commands for a terminal."""

    document: str
    line: int
    section: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands, each with its continued lines and without comments."""
        commands, unfinished = [], ""
        for line in self.text.splitlines():
            unfinished += COMMENT.sub("", line) + "\n"
            if _is_complete(unfinished):
                commands.append(unfinished.strip())
                unfinished = ""
        assert not unfinished, f"{self}: a command that does not end: {unfinished}"
        return [command for command in commands if command]


def _is_complete(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("\\\n")


def documents() -> list[str]:
    return ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]


def blocks_of(document: str) -> list[Block]:
    text = (REPOSITORY / document).read_text()
    blocks = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        section = (re.findall(r"^## (.*)$", before, re.MULTILINE) or [""])[-1]
        blocks.append(Block(document, before.count("\n") + 1, section, fence[1], fence[2]))
    return blocks


def is_server(command: str) -> bool:
    return any(command.startswith(program) for program in READY)


class Machine:
    """A machine on which the package is installed, and the commands that were started on it."""

    def __init__(self, enter: Sequence[str], folder: Path) -> None:
        """enter: the words that run a command in the machine's network. folder is its working folder."""
        self._enter = list(enter)
        self.folder = folder
        self._logs: list[Path] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
        # An HTTP error is then an error of curl's.
        (folder / ".curlrc").write_text("fail-with-body\n")
        own = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "CURL_HOME": str(folder)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "HF_"))}
        self._environment = {**kept, **own, "PATH": path}
        put_models(folder)

    def run(self, command: str | Sequence[str], typed: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command of a shell, or a program with its arguments, with a text typed into it."""
        words = ["bash", "-c", command] if isinstance(command, str) else command
        return subprocess.run(
            [*self._enter, *words],
            input=typed,
            capture_output=True,
            text=True,
            timeout=2 * WAIT_S,
            cwd=self.folder,
            env=self._environment,
        )

    def serve(self, command: str) -> None:
        """Starts a command of READY and waits until it can be used."""
        self._logs.append(self.folder / f"{len(self._logs)}.log")
        with self._logs[-1].open("wb") as log:
            server = subprocess.Popen(
                [*self._enter, "bash", "-c", f"exec {command}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )
        self._servers.append(server)
        [probe] = [probe for program, probe in READY.items() if command.startswith(program)]
        wait_until(lambda: server.poll() is not None or self.run(probe).returncode == 0, command)
        assert server.poll() is None, f"{command} ended:\n{self.log}"

    @property
    def log(self) -> str:
        """What the servers printed."""
        return "\n".join(log.read_text() for log in self._logs)

    def stop(self) -> list[int]:
        """Ends the servers as a user does, the last one first; returns their exit statuses."""
        statuses = []
        while self._servers:
            server = self._servers.pop()
            server.terminate()
            try:
                statuses.append(server.wait(WAIT_S))
            finally:
                server.kill()
        return statuses


@contextmanager
def new_machine(folder: Path) -> Iterator[Machine]:
    """Gives a machine; at the end its servers are stopped, and must have ended well."""
    with network_namespaces(1) as [holder]:
        machine = Machine(entering(holder), folder)
        try:
            yield machine
        finally:
            statuses = machine.stop()
            print(machine.log)
        assert not any(statuses), statuses


def put_models(folder: Path) -> None:
    """Puts the embedded model where the documents say that there are Qwen3's models."""
    model = resolve_model("embedded", [])
    (folder / "Qwen3-0.6B").symlink_to(model)
    cached = folder / "hub" / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(model)
    # As the larger model has a longer context.
    larger = folder / "Qwen3-8B"
    larger.mkdir()
    for path in model.iterdir():
        if path.name != "config.json":
            (larger / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
