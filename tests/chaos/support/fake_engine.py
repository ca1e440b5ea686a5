"""Engines of real processes whose worker is the fake one."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.support import fake_service
from tests.chaos.support.crowd import number_of
from tests.e2e.services import Engine


@dataclass(frozen=True)
class FakeEngine:
    engine: Engine
    starts_file: Path

    def starts(self) -> list[tuple[int, float]]:
        """For each row that a plan added: its call's number, and when (time.monotonic()) the worker got the plan."""
        lines = [line.split() for line in self.starts_file.read_text().splitlines()]
        return [(number_of(int(first), int(second)), float(at)) for at, first, second in lines]


def capacity_per_s(num_rows: int, num_tokens: int, step_ms: float) -> float:
    """The calls of num_tokens output tokens each that a fake engine of num_rows rows can serve in a second."""
    return num_rows / (num_tokens * step_ms / 1000)


@contextlib.contextmanager
def running_fake_engine(*, step_ms: float, num_rows: int, front_ends: int, **flags: object) -> Iterator[FakeEngine]:
    """flags: command-line options of the scheduler; max_num_waiting=32 stands for --max-num-waiting 32."""
    scheduler_flags = {"api-server-count": front_ends, "max-num-seqs": num_rows}
    scheduler_flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder:
        starts = Path(folder) / "starts"
        engine = Engine(
            "embedded",
            worker=[fake_service.MODULE, str(step_ms), str(num_rows), str(starts)],
            scheduler_flags=[text for name, value in scheduler_flags.items() for text in (f"--{name}", str(value))],
        )
        with contextlib.closing(engine):
            yield FakeEngine(engine, starts)
