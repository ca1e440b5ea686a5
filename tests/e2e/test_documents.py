"""Every code block of README.md and docs runs as it stands, or is an exception that is named here with its reason."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tandem_shared.config import SchedulerSettings, read_command_line
from tests.e2e.documents import Block, Machine, blocks_of, documents, is_server, new_machine
from tests.e2e.hosts import PROGRAMS, why_no_hosts
from tests.support.programs import require_programs
from tests.support.requirements import ROOT, declared_requirements, link_packages

EXCEPTIONS = {
    r"make demo|\. \.venv/bin/activate": "test_a_clone_has_text_on_the_screen runs them in a copy of the checkout",
    r"make test": "runs all tests, and is what CI runs",
    r"make bench.*": "measures for minutes, and wants a GPU; tests/unit/benchmarks runs its parts",
    r"make chaos.*": "takes hours; tests/chaos runs short forms of its parts",
    r"(\w+=\S+ )*docker compose ((-f|--profile) \S+ )*up": "needs Docker; `make compose-test` runs them with podman",
    r"pip install .*": "downloads; tests/e2e/test_wheel.py installs the extras",
    r"torchrun .*": "two hosts; tests/e2e/test_tensor_parallel.py runs it on two",
    r"kubectl .*": "there is no cluster; tests/unit/deploy builds what they apply",
    r"smg launch .*": "three hosts; tests/e2e/test_smg.py runs it before two Tandems",
}
"""Commands that no test here runs -> why. Patterns of whole commands."""

REPLACED = {
    # Smaller numbers, for a CPU.
    "--num-prompts 256": "--num-prompts 6",
    "--request-rate 8 16 inf": "--request-rate 40 inf",
    "100-1024": "5-9",
    # The embedded model has fewer tokens than a server is taken to have.
    "bench --base-url": "bench --vocab-size 1000 --base-url",
    # The other host's name.
    "gpu-host": "127.0.0.1",
}
"""Texts of commands -> what the test has in their places."""

TYPED = "Who are you?\n"
BLOCKS = [block for document in documents() for block in blocks_of(document)]
QUICK_START = [block for block in BLOCKS if block.document == "README.md" and block.section == "Quick start"]
SERVE = "tandem serve"


def is_exception(command: str) -> bool:
    return any(re.fullmatch(pattern, command, re.DOTALL) for pattern in EXCEPTIONS)


def to_run(block: Block) -> list[str]:
    """The block's commands that are no exceptions."""
    commands = []
    for command in block.commands:
        if not is_exception(command):
            for old, new in REPLACED.items():
                command = command.replace(old, new)
            commands.append(command)
    return commands


def has_server(block: Block) -> bool:
    return not block.language and any(map(is_server, block.commands))


def is_slow(block: Block) -> bool:
    """Whether it takes more than some seconds: it starts a service of its own, or is no part of the quick start."""
    return block not in QUICK_START or "LLM(" in block.text or "tandem bench" in block.text


def parameters(blocks: list[Block]) -> list[object]:
    return [pytest.param(block, marks=[pytest.mark.slow] * is_slow(block), id=str(block)) for block in blocks]


@pytest.fixture(scope="module")
def can_make_machines() -> None:
    require_programs(*PROGRAMS, "curl")
    if obstacle := why_no_hosts():
        pytest.skip(obstacle)


@pytest.fixture(scope="module")
def machine(can_make_machines: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the quick start's server runs."""
    [serve] = [command for block in QUICK_START for command in block.commands if command.startswith(SERVE)]
    with new_machine(tmp_path_factory.mktemp("machine")) as machine:
        machine.serve(serve)
        yield machine


def check(machine: Machine, command: str | list[str]) -> None:
    done = machine.run(command, TYPED)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert re.search(r"\w{2}", done.stdout), (command, done.stderr)


@pytest.mark.parametrize("block", parameters([b for b in BLOCKS if not b.language and not has_server(b) and to_run(b)]))
def test_commands_run(block: Block, machine: Machine) -> None:
    for command in to_run(block):
        check(machine, command)


@pytest.mark.parametrize("block", parameters([b for b in BLOCKS if b.language == "python"]))
def test_programs_run(block: Block, machine: Machine) -> None:
    check(machine, ["python", "-c", block.text])


def test_the_quick_starts_server_says_that_it_is_ready_and_has_a_page(machine: Machine) -> None:
    start = "tandem serve: ready; a page to chat is "
    [page] = [line.removeprefix(start) for line in machine.log.splitlines() if line.startswith(start)]
    assert page in (ROOT / "README.md").read_text()
    assert "<title>Tandem</title>" in machine.run(f"curl {page}").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [pytest.param(b, id=str(b)) for b in BLOCKS if has_server(b) and b not in QUICK_START]
)
def test_servers_run(can_make_machines: None, block: Block, tmp_path: Path) -> None:
    with new_machine(tmp_path) as machine:
        for command in to_run(block):
            if is_server(command):
                machine.serve(command)
            else:
                check(machine, command)
        asks_for_keys = "--api-key-file" in block.text
        if not asks_for_keys and any(re.match("tandem serve|tandem-scheduler", command) for command in to_run(block)):
            check(machine, "tandem generate ROMEO: --max-tokens 8")


@pytest.mark.slow
def test_a_clone_has_text_on_the_screen(tmp_path: Path) -> None:
    """The first block of the quick start, in a copy of the checkout. What it would download is in .venv beforehand."""
    copied = ["Makefile", "README.md", "LICENSE", "pyproject.toml", "constraints.txt", "tandem", "shared"]
    for name in [*copied, "gateway_service", "scheduler_service", "worker_service"]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    [packages] = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    link_packages(packages, [*declared_requirements("worker"), "setuptools"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "TANDEM_"))}
    environment |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    done = subprocess.run(
        ["bash", "-e", "-c", QUICK_START[0].text + "command -v tandem"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ROMEO:\n.*\n200 tokens: TTFT \d", done.stdout, re.DOTALL), done.stdout
    assert Path(done.stdout.splitlines()[-1]) == tmp_path / ".venv" / "bin" / "tandem"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_files_of_settings_are_taken(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "tandem.yaml"
    file.write_text(block.text)
    settings = read_command_line(SchedulerSettings, "tandem-scheduler", "", ["--config", str(file)])
    for name, value in yaml.safe_load(block.text).items():
        expected = ",".join(value) if isinstance(value, list) else value
        assert getattr(settings, name.replace("-", "_")) == expected


def test_blocks_are_of_known_kinds_and_exceptions_are_needed() -> None:
    assert {block.language for block in BLOCKS} <= {"", "python", "text", "yaml"}
    assert 2 * len(BLOCKS) == sum((ROOT / document).read_text().count("```") for document in documents())
    commands = [command for block in BLOCKS if not block.language for command in block.commands]
    for pattern in [*EXCEPTIONS, *map(re.escape, REPLACED)]:
        assert any(re.search(pattern, command) for command in commands), f"{pattern} is no exception any more"


LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


@pytest.mark.parametrize("document", documents())
def test_links_lead_to_files(document: str) -> None:
    path = ROOT / document
    missing = [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]
    assert not missing


def test_the_readme_names_every_document() -> None:
    assert set(documents()) <= {"README.md", *LINK.findall((ROOT / "README.md").read_text())}
