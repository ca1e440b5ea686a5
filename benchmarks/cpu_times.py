"""The CPU time of the processes of a measurement, by what they do. Linux only."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tandem.processes import Services

TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


class CpuTimes:
    """What the processes of services, and the client processes that this one started, have used so far."""

    def __init__(self, services: Services) -> None:
        started = {"worker": services.worker, "scheduler": services.scheduler, "gateway": services.gateway}
        self._roots = {name: process.pid for name, process in started.items() if process is not None}

    def read(self) -> dict[str, float]:
        """CPU seconds of each role. What the scheduler process started (front ends, renderers of chat templates) is
        "front_ends"; "benchmark" is this process alone.
        """
        seconds, children = _processes()
        found = {name: sum(seconds[pid] for pid in _tree(root, children)) for name, root in self._roots.items()}
        found["front_ends"] = found["scheduler"] - seconds[self._roots["scheduler"]]
        found["scheduler"] -= found["front_ends"]
        found["benchmark"] = seconds[os.getpid()]
        own = sum(seconds[pid] for pid in _tree(os.getpid(), children))
        found["clients"] = own - sum(found.values())
        return found


def _processes() -> tuple[dict[int, float], dict[int, list[int]]]:
    """CPU seconds of all processes, and the children of each."""
    seconds: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # has ended meanwhile
        # The name before the last bracket may contain anything.
        fields = text.rpartition(")")[2].split()
        pid = int(folder.name)
        seconds[pid] = (int(fields[11]) + int(fields[12])) * TICKS_S
        children.setdefault(int(fields[1]), []).append(pid)
    return seconds, children


def _tree(root: int, children: Mapping[int, list[int]]) -> Iterator[int]:
    yield root
    for child in children.get(root, ()):
        yield from _tree(child, children)
