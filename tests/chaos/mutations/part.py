"""Whether the harness notices a broken build. Each mutation changes one place in a copy of the tree, in which the short
form of the part that should notice it must then fail.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import REPOSITORY
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.mutations.mutation_list import MUTATIONS, Mutation

TIMEOUT_S = 600.0
"""The time limit of a run. The tests' own timeouts notice a build that hangs long before."""
FAILED = 1
"""pytest's exit status where tests ran and failed."""
SOURCE_FOLDERS = (".", "shared", "gateway_service", "scheduler_service", "worker_service")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")


def find(root: Path, file: str) -> Path:
    """The file of a package, which is in one of the tree's SOURCE_FOLDERS."""
    return next(path for folder in SOURCE_FOLDERS if (path := root / folder / file).exists())


def mutate(root: Path, mutation: Mutation) -> None:
    """Changes the tree. Raises ValueError if the mutation does not fit it."""
    path = find(root, mutation.file)
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new))


def run(first: int, count: int) -> Found:
    """Tries `count` mutations from `first` on, and the unchanged tree, which must pass."""
    tried = []
    batch = MUTATIONS[first : first + count]
    for mutation in batch:
        with _copy() as root:
            mutate(root, mutation)
            tried.append({**vars(mutation), "noticed": how_it_fails(root, mutation.part)})
        print(f"  {mutation.file}: {mutation.new.strip()!r}: {tried[-1]['noticed'] or 'NOT NOTICED'}", flush=True)
    with _copy() as root:
        sound = {part: how_it_fails(root, part) for part in sorted({mutation.part for mutation in batch})}
    return {"mutations": tried, "sound": sound}


@contextlib.contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tandem-mutation-") as folder:
        root = Path(folder, "tree")
        shutil.copytree(REPOSITORY, root, ignore=NOT_COPIED)
        yield root


def how_it_fails(root: Path, part: str) -> str:
    """The failure of a part's short form in this tree; empty if it passes."""
    test = f"tests/chaos/test_forms.py::test_short_form[{part}]"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--tb=line", test]
    try:
        # COLUMNS is wide so that pytest does not cut messages short.
        python_path = os.pathsep.join(str(root / folder) for folder in SOURCE_FOLDERS)
        environment = {**os.environ, "COLUMNS": "400", "PYTHONPATH": python_path}
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no end in {TIMEOUT_S:g} s"
    if ended.returncode == 0:
        return ""
    if ended.returncode != FAILED:
        raise RuntimeError(f"no test ran: {ended.stdout[-1000:]}{ended.stderr[-1000:]}")
    told = [line for line in ended.stdout.splitlines() if line.startswith(("E ", "FAILED", "ERROR"))]
    return (told or ended.stdout.splitlines() or ["failed without a word"])[-1].replace(str(root), "")[:300]


def rows(pieces: Sequence[Found]) -> list[Row]:
    tried = [mutation for piece in pieces for mutation in piece["mutations"]]
    missed = [mutation for mutation in tried if not mutation["noticed"]]
    sound = [told for piece in pieces for told in piece["sound"].values()]
    false = [told for told in sound if told]
    files = {mutation["file"] for mutation in tried}
    return [
        Row(
            "the harness notices a build that is broken",
            f"{len(tried)} faults of one place, put into {len(files)} files one at a time",
            f"{len(tried) - len(missed)} noticed by the short form; {len(false)} of {len(sound)} runs without a fault "
            "were taken for broken",
            len(tried) >= 30 and not missed and not false,
        )
    ]


BATCH = 5
PART = Part(
    "mutations",
    run,
    rows,
    {
        Form.SHORT: (),
        Form.LONG: (),
        Form.FULL: [{"first": first, "count": BATCH} for first in range(0, len(MUTATIONS), BATCH)],
    },
)
