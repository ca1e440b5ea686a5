"""The files that the documents for developers name in backticks are there."""

import re

import pytest

from tests.support.requirements import ROOT

DOCUMENTS = ["CONTRIBUTING.md", *(str(each.relative_to(ROOT)) for each in (ROOT / "docs").rglob("*.md"))]
SUFFIXES = ("py", "proto", "md", "toml", "jinja", "sh", "yaml", "yml")
NAMED = re.compile(rf"`([\w./-]*\w\.(?:{'|'.join(SUFFIXES)}))`")
# Folders of the repository as the documents shorten them.
SHORTENED = {"shared/": "tandem_shared/"}
FOLDERS = [
    "benchmarks",
    "docs",
    "examples",
    "gateway_service",
    "protos",
    "scheduler_service",
    "shared",
    "tandem",
    "tests",
]
FOLDERS += ["tools", "training", "worker_service", "deploy"]
LEFT_OUT = {"docs/performance-log.md", "docs/reading.md"}
"""A log tells of files as they were; test_reading.py reads the other."""
USERS = {"example.py"}
"""Files of a user's own."""


@pytest.fixture(scope="module")
def paths() -> set[str]:
    found = {path.name for path in ROOT.iterdir()}
    for folder in FOLDERS:
        found |= {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if "node_modules" not in path.parts
        }
    return {f"/{path}" for path in found}


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - LEFT_OUT))
def test_named_files_are_there(document: str, paths: set[str]) -> None:
    missing = []
    for name in set(NAMED.findall((ROOT / document).read_text())) - USERS:
        forms = [name.removeprefix("../"), *(name.replace(old, new, 1) for old, new in SHORTENED.items())]
        if not any(path.endswith(f"/{form}") for form in forms for path in paths):
            missing.append(name)
    assert not missing
