"""docs/reading.md: the files and names that it mentions are there, and what it tells readers to break is noticed."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.requirements import ROOT

TEXT = (ROOT / "docs" / "reading.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FOLDERS = {"S/": "scheduler_service/tandem_scheduler/", "W/": "worker_service/tandem_worker/"}
FENCE = re.compile(r"^```text\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NOT_OURS = {"PATH", "__main__"}
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__", "*.egg-info", "node_modules")
FAILS = "   # fails"
TIMEOUT_S = 240


def paths_in(section: str) -> list[Path]:
    marked = [re.sub("^[SW]/", lambda found: FOLDERS[found[0]], each) for each in marked_in(section) if "/" in each]
    linked = [f"docs/{each}" for each in re.findall(r"\]\(([^)#]+)\)", section)]
    return [ROOT / each for each in [*marked, *linked] if not each.startswith(".venv")]


def marked_in(section: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", section))


def names_in(path: Path) -> Iterator[str]:
    """The names that a file defines: NAME, or CLASS.NAME and NAME for what is in a class."""
    if path.suffix == ".proto":
        yield from re.findall(r"^(?:message|enum|service) (\w+)", path.read_text(), re.MULTILINE)
    if path.suffix == ".py":
        for node in ast.parse(path.read_text()).body:
            for name in names_of(node):
                yield name
                for member in node.body if isinstance(node, ast.ClassDef) else ():
                    yield from (form for each in names_of(member) for form in (each, f"{name}.{each}"))


def names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_files_and_names_are_there() -> None:
    known = set(NOT_OURS)
    for title, section in SECTIONS.items():
        paths = paths_in(section)
        assert all(path.exists() for path in paths), (title, [path for path in paths if not path.exists()])
        known.update(name for path in paths for name in names_in(path))
        names = {each for each in marked_in(section) if re.fullmatch(r"[A-Za-z_][\w.]*", each)}
        assert names <= known, (title, names - known)


def test_every_topic_has_a_file_and_something_to_try() -> None:
    *topics, last = SECTIONS.items()
    assert last[0] == "Then"
    for number, (title, section) in enumerate(topics, start=1):
        assert title.startswith(f"{number}. ")
        assert section.startswith("\n**Open** ") and len(FENCE.findall(section)) == 1
        for line in FENCE.findall(section)[0].splitlines():
            if line.startswith("sed"):
                program, path = re.fullmatch(r"sed -i '(.*)' (\S+)", line).groups()  # type: ignore[union-attr]
                done = subprocess.run(["sed", program, ROOT / path], capture_output=True, text=True, check=True)
                assert done.stdout != (ROOT / path).read_text(), f"{title}: {line} changes nothing"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("reader") / "tandem", ignore=NOT_COPIED)


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title, section in SECTIONS.items() if FENCE.search(section)])
def test_what_is_broken_is_noticed(title: str, copy: Path) -> None:
    lines = FENCE.findall(SECTIONS[title])[0].splitlines()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYT", "TANDEM_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    changed = {copy / line.split()[-1]: (ROOT / line.split()[-1]).read_text() for line in lines if line[:3] == "sed"}
    try:
        for line in lines:
            done = subprocess.run(
                ["bash", "-c", line], cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            assert (done.returncode != 0) == (FAILS in line), done.stdout + done.stderr
            if "pytest" in line:
                # The change breaks a test, and not the file or the command.
                assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
                assert "\nFAILED " in done.stdout and "SyntaxError" not in done.stdout, done.stdout
    finally:
        for path, text in changed.items():
            path.write_text(text)
