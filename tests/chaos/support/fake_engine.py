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
        """The number of the call of each row that a plan added, and when (time.monotonic()) the worker had the plan."""
        lines = [line.split() for line in self.starts_file.read_text().splitlines()]
        return [(number_of(int(first), int(second)), float(at)) for at, first, second in lines]


@contextlib.contextmanager
def running_fake_engine(*, step_ms: float, num_rows: int, front_ends: int, **flags: object) -> Iterator[FakeEngine]:
    """flags: the scheduler's."""
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
