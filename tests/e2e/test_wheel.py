"""The wheel as others install it: in environments that have the requirements it declares, and nothing of this checkout.

The environments hold links to packages that are installed here, so nothing but the build's own tools is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from tandem.processes import Services
from tandem_shared import VERSION
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tests.support.requirements import ROOT, declared_requirements, link_packages

pytestmark = pytest.mark.slow

SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "tandem",
    "shared",
    "gateway_service",
    "scheduler_service",
    "worker_service",
)
FOLDERS_OF_THE_USER = ("shared", "gateway_service", "scheduler_service", "worker_service", "protos")
TIMEOUT_S = 120


class Installation:
    """A virtual environment with the wheel and the requirements of an extra, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path, extra: str | None) -> None:
        self.bin = folder / "venv" / "bin"
        self.project = folder / "project"
        run([sys.executable, "-m", "venv", "--without-pip", self.bin.parent])
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        link_packages(self.bin.parent / "lib" / python / "site-packages", declared_requirements(extra))
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        run([*pip, "--no-deps", "--no-index", wheel])
        # Python puts the folder that it runs in first on its path, and the user's packages with it.
        for name in FOLDERS_OF_THE_USER:
            (self.project / name).mkdir(parents=True)
            (self.project / name / "__init__.py").write_text("raise RuntimeError('this is not Tandem')\n")

    def run(self, program: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return run([self.bin / program, *arguments], cwd=self.project, status=status)


def run(command: Sequence[str | Path], cwd: Path | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "TANDEM_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools would put what earlier builds left in build/ into the wheel.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source])
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def client_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("base"), wheel, None)


@pytest.fixture(scope="module")
def with_worker(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("worker"), wheel, "worker")


def test_the_wheel_installs_nothing_but_tandem(wheel: Path) -> None:
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    packages = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert packages == {"tandem", "tandem_gateway", "tandem_scheduler", "tandem_shared", "tandem_worker"}
    assert {name.parent.name for name in names if name.name == "py.typed"} == packages


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Metadata.from_email(archive.read(name), validate=True)
        assert metadata.license_files
        for file in metadata.license_files:
            assert archive.read(name.replace("METADATA", f"licenses/{file}")) == (ROOT / file).read_bytes()
    assert (metadata.name, str(metadata.version)) == ("tandem-llm", VERSION)
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text()
    assert metadata.summary and metadata.keywords and metadata.classifiers
    assert metadata.requires_python
    oldest = min(each.rpartition(" ")[2] for each in metadata.classifiers if re.search(r":: 3\.\d+$", each))
    assert f">={oldest}" == str(metadata.requires_python)


def test_the_wheel_holds_the_protos(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.endswith(".proto")}
    protos = ROOT / "protos"
    assert held == {str(path.relative_to(protos)): path.read_bytes() for path in protos.rglob("*.proto")}


def test_the_demo_runs_beside_folders_of_the_users(with_worker: Installation) -> None:
    done = with_worker.run("tandem", "demo")
    assert re.search(r"ROMEO:\n.*\n200 tokens: TTFT \d", done.stdout, re.DOTALL), done.stdout


def test_llm_runs_beside_folders_of_the_users(with_worker: Installation) -> None:
    code = """
import tandem, tandem_gateway, tandem_scheduler, tandem_shared, tandem_worker
from tandem import LLM, SamplingParams
with LLM("embedded") as llm:
    print(len(llm.generate("ROMEO:", SamplingParams(max_tokens=5, ignore_eos=True))[0]["token_ids"]))
for package in (tandem, tandem_gateway, tandem_scheduler, tandem_shared, tandem_worker):
    print(package.__file__)
"""
    num_tokens, *files = with_worker.run("python", "-c", code).stdout.split()
    assert num_tokens == "5"
    assert all(Path(file).is_relative_to(with_worker.bin.parent) for file in files), files


def test_types_are_seen_by_mypy(with_worker: Installation) -> None:
    source = with_worker.project / "typed.py"
    source.write_text(
        "import tandem\n"
        "from tandem import LLM, AsyncTandemClient, PromptsFailed, SamplingParams, TandemClient\n"
        "from tandem_shared.errors import InvalidRequest\n"
        "reveal_type(TandemClient('x').load().num_running_sequences)\n"
        "reveal_type(InvalidRequest().violations)\n"
        "reveal_type(tandem.__version__)\n"
        "output = LLM('x', tensor_parallel_size=1).generate(['a', 'b'], SamplingParams(top_k=1))[0]\n"
        "reveal_type(output.outputs[0].text)\n"
        "LLM('x').generate([[1], [2]], [SamplingParams(), SamplingParams()])\n"
        "LLM('x').chat([{'role': 'user', 'content': 'a'}])\n"
        "reveal_type(PromptsFailed({}, []).outputs)\n"
        "async def use(client: AsyncTandemClient) -> None:\n"
        "    reveal_type((await client.generate([1, 2])).request_id)\n"
        "    async for delta in client.generate_stream([1]):\n"
        "        reveal_type(delta.text_delta)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", with_worker.bin / "python", "typed.py"]
    revealed = re.findall(r'Revealed type is "(.*)"', run(mypy, cwd=with_worker.project).stdout)
    assert [re.sub(r"\w+\.", "", name) for name in revealed] == [
        "int", "tuple[FieldViolation, ...]", "str", "str", "list[RequestOutput | None]", "str", "str",
    ]  # fmt: skip


def test_the_client_alone_generates(client_alone: Installation) -> None:
    with Services(WorkerSettings(port=0), SchedulerSettings(port=0)) as services:
        services.wait_until_ready(TIMEOUT_S)
        done = client_alone.run(
            "tandem", "generate", "ROMEO:", "--address", services.address, "--max-tokens", "5", "--ignore-eos"
        )
    assert "5 tokens" in done.stderr


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("tandem demo", "worker"),
        ("tandem serve embedded", "worker"),
        ("tandem-worker", "worker"),
        ("tandem-scheduler", "scheduler"),
        ("python -m tandem_worker", "worker"),
        ("python -m tandem_scheduler", "scheduler"),
    ],
)
def test_the_client_alone_says_what_to_install(client_alone: Installation, command: str, extra: str) -> None:
    done = client_alone.run(*command.split(), status=2)
    assert f"install tandem-llm[{extra}]: no module named grpc_channelz" in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_a_scheduler_alone_needs_no_worker_package(wheel: Path, tmp_path: Path) -> None:
    scheduler = Installation(tmp_path, wheel, "scheduler")
    port_file = scheduler.project / "port"
    code = """
import os, signal, subprocess, sys, time
from tandem import TandemClient
process = subprocess.Popen(["tandem-scheduler", "--port", "0", "--port-file", sys.argv[1]])
while not os.path.exists(sys.argv[1]):
    assert process.poll() is None
    time.sleep(0.05)
with TandemClient(f"127.0.0.1:{open(sys.argv[1]).read()}") as client:
    print(client.detokenize(client.tokenize("ROMEO:")))
process.send_signal(signal.SIGTERM)
sys.exit(process.wait())
"""
    code = code.replace('"tandem-scheduler"', repr(str(scheduler.bin / "tandem-scheduler")))
    assert scheduler.run("python", "-c", code, str(port_file)).stdout == "ROMEO:\n"
    done = scheduler.run("tandem-worker", status=2)
    assert done.stderr == "tandem-worker: install tandem-llm[worker]: no module named safetensors, torch\n"
