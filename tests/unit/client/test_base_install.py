"""Without extras the package is a client: it works, and what needs more says what to install."""

import os
import subprocess
import sys

import pytest

from tandem_shared import VERSION
from tandem_shared.extras import MODULES_OF_EXTRA
from tests.support.requirements import declared_requirements

MODULES = {
    "google": "protobuf, googleapis-common-protos",
    "grpc": "grpcio",
    "grpc_channelz": "grpcio-channelz",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "opentelemetry.exporter.otlp.proto.grpc": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "smg_grpc_proto": "smg-grpc-proto",
    "yaml": "pyyaml",
}
"""The packages whose modules are not called as they are."""

WITHOUT_EXTRAS = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class OnlyBase:
    allowed = {"google", "grpc", "tandem", "tandem_shared", "tqdm", "typing_extensions", *sys.stdlib_module_names}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.partition(".")[0] in cls.allowed else None

for name in [name for name in sys.modules if name.partition(".")[0] not in OnlyBase.allowed | {"__main__"}]:
    del sys.modules[name]
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyBase]
"""
"""Leaves a process the modules of a base install: the standard library and what the base requirements bring."""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("extra", ["cli", "gateway", "otel", "scheduler", "smg", "worker"])
def test_the_check_of_an_extra_knows_what_the_extra_installs(extra: str) -> None:
    brought = set(declared_requirements(extra)) - set(declared_requirements())
    named = {requirement.partition(">=")[0] for requirement in brought}
    modules = {
        module
        for each in ([extra, "cli", "gateway"] if extra == "worker" else [extra])
        for module in MODULES_OF_EXTRA[each]
    }
    assert {MODULES.get(module, module) for module in modules} == named


def test_the_base_install_is_what_the_client_imports() -> None:
    named = {requirement.partition(">=")[0] for requirement in declared_requirements()}
    assert named == {"googleapis-common-protos", "grpcio", "protobuf", "tqdm"}
    code = """
import tandem
from tandem import *
TandemClient('127.0.0.1:1').close()
LLM(address='127.0.0.1:1').close()
print('made', tandem.__version__)
"""
    done = run_without_extras(code)
    assert (done.stdout, done.stderr) == (f"made {VERSION}\n", "")


def test_generate_needs_no_extra() -> None:
    # Nobody listens at that port, so the call gets as far as the network.
    done = run_without_extras(
        "from tandem.cli import main; sys.exit(main(['generate', 'x', '--address', '127.0.0.1:1']))"
    )
    assert done.returncode == 1
    assert "connect" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["demo"], ["serve", "embedded"]])
def test_commands_that_run_the_services_say_what_to_install(arguments: list[str]) -> None:
    done = run_without_extras(f"from tandem.cli import main; sys.exit(main({arguments}))")
    assert done.returncode == 2
    assert done.stderr.startswith(f"tandem {arguments[0]}: install tandem-llm[worker]: no module named grpc_channelz")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_traces_say_what_to_install() -> None:
    done = run_without_extras("from tandem_shared.tracing import check_traces; check_traces('http://127.0.0.1:4317')")
    problem = "install tandem-llm[otel]: no module named opentelemetry.exporter.otlp.proto.grpc, opentelemetry.sdk"
    assert done.stderr.splitlines()[-1] == f"tandem_shared.errors.ConfigError: {problem}"


def test_llm_says_what_to_install() -> None:
    done = run_without_extras("from tandem import LLM; LLM('embedded')")
    assert done.stderr.splitlines()[-1].startswith("tandem_shared.errors.ConfigError: install tandem-llm[worker]: ")
