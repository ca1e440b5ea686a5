"""Hostile folders given to the services' loaders and commands, and the faults in what they say."""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from tandem_shared.model_folder import resolve_model
from tests.chaos.folders.cases import OUTSIDE
from tests.chaos.folders.changes import GENERATION, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from tests.support.model_factory import save_random_model

TIMEOUT_S = 20.0
"""The time limit for one folder. A load takes milliseconds; a real command needs seconds for its imports."""
MAX_ERROR_CHARACTERS = 2000
MEMORY_BYTES = 24 << 30
"""The limit on the address space of a real command."""


class Reader:
    """The process of reader.py, which is started again if a folder ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.folders.reader"]
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def read(self, folder: Path) -> dict[str, Any] | str:
        """The outcomes that reader.py reports for a folder, or how the process failed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        has_answer = bool(select.select([process.stdout], [], [], TIMEOUT_S)[0])
        answer = process.stdout.readline() if has_answer else ""
        if answer:
            result: dict[str, Any] = json.loads(answer)
            return result
        self.close()
        problem = f"the process ended with status {process.returncode}" if has_answer else f"hangs for {TIMEOUT_S:g} s"
        self._start()
        return problem

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def valid_folder() -> Iterator[Path]:
    """A model folder that both services accept, inside a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tandem-folders-") as root:
        folder = save_random_model(Path(root, "valid"), vocab_size=1024)
        embedded = resolve_model("embedded", [])
        for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION):
            shutil.copy(embedded / name, folder / name)
        shutil.copy(folder / WEIGHTS, Path(root, OUTSIDE))
        yield folder


@contextlib.contextmanager
def changed(valid: Path, name: str) -> Iterator[Path]:
    """A new folder of hard links to the files of a valid one, to be changed."""
    folder = valid.parent / name
    folder.mkdir()
    for path in valid.iterdir():
        os.link(path, folder / path.name)
    yield folder
    shutil.rmtree(folder)


def faults_in(answer: dict[str, Any] | str, folder: Path, named: Sequence[str] | None) -> list[str]:
    """Faults in what reader.py reported. named: words that an error of either service must contain; None if the folder
    may also be served.
    """
    if isinstance(answer, str):
        return [answer]
    outcomes = [answer["worker"], answer["scheduler"]]
    errors = [text for kind, text in outcomes if kind not in ("served", "traceback")]
    faults = [f"traceback: {text}" for kind, text in outcomes if kind == "traceback"]
    faults += [f"names no file of the folder: {text}" for text in errors if str(folder) not in text]
    faults += [f"an error of {len(text)} characters" for text in errors if len(text) > MAX_ERROR_CHARACTERS]
    faults += [f"opened {path}" for path in answer["opened"]]
    if named is not None and not faults:
        if not errors:
            faults.append("was served")
        elif not any(all(word in text for word in named) for text in errors):
            faults.append(f"does not name {' and '.join(named)}: {errors[0]}")
    return faults


def command_faults(folder: Path, named: Sequence[str]) -> list[str]:
    """Starts the real commands of both services, of which one at least must refuse the folder. Returns faults."""
    flags: dict[str, list[str]] = {
        "tandem_worker": ["--device", "cpu", "--num-threads", "1", "--num-blocks", "8"],
        "tandem_scheduler": ["--worker-address", "127.0.0.1:1", "--api-server-count", "0"],
    }
    faults, texts = [], []
    for module, own in flags.items():
        command = [sys.executable, "-m", module, "--model", str(folder), "--port", "0", *own]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_limit
        )
        try:
            text, _ = process.communicate(timeout=TIMEOUT_S if not texts else 5.0)
        except subprocess.TimeoutExpired:
            # This service found nothing wrong in the files that it reads.
            process.terminate()
            text, _ = process.communicate()
            if "listening on" not in text:
                faults.append(f"{module} neither ends nor listens")
            continue
        if process.returncode != 2:
            faults.append(f"{module} ended with status {process.returncode}: {text[-300:]}")
        if "Traceback" in text:
            faults.append(f"{module} has a traceback: {text[-300:]}")
        texts.append(text)
    if not any(all(word in text for word in named) for text in texts):
        faults.append(f"no command names {' and '.join(named)}: {re.sub(chr(10), ' ', ' '.join(texts))[-300:]}")
    return faults


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
