"""Loads model folders as both services do when they start, in a process with little memory.

`python -m tests.chaos.folders.reader` reads the path of a folder from each line of standard input, and writes the
outcome as one line of JSON.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem_scheduler.front_end.chat.template_folder import read_chat_templates
from tandem_scheduler.front_end.front_end import FrontEnd
from tandem_scheduler.front_end.text.tokenizer import load_tokenizer
from tandem_scheduler.model_check import ModelCheck
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError, ModelError
from tandem_worker.startup import build_runner

MEMORY_BYTES = 2 << 30
"""Address space that the process may use beyond what it has once it is ready."""


async def _ignore_readiness(is_ready: bool) -> None:
    pass


def start_worker(folder: Path) -> None:
    build_runner(WorkerSettings(model=str(folder), device="cpu", num_threads=1, num_blocks=8, max_num_seqs=4))


def start_scheduler(folder: Path) -> None:
    FrontEnd(load_tokenizer(folder), _ignore_readiness)
    read_chat_templates(folder)
    ModelCheck(SchedulerSettings(model=str(folder)), folder)


def outcome(start: Callable[[Path], None], folder: Path) -> list[str]:
    """["served", ""], or the class of the error and its text. An unexpected error has "traceback" in place of its
    class.
    """
    try:
        start(folder)
    except (ModelError, ConfigError) as error:
        return [type(error).__name__, str(error)]
    except BaseException as error:
        return ["traceback", f"{type(error).__name__}: {error}"[:500]]
    return ["served", ""]


def main() -> None:
    opened: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    torch.zeros(1)
    sys.addaudithook(note)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", flush=True)
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        opened.clear()
        outcomes = {"worker": outcome(start_worker, folder), "scheduler": outcome(start_scheduler, folder)}
        beside = [path for path in opened if path.startswith(f"{folder.parent}/") and Path(path).parent != folder]
        print(json.dumps({**outcomes, "opened": beside}), flush=True)


if __name__ == "__main__":
    main()
