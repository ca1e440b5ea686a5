"""The container engine of compose_test.py: podman, on a machine where no engine runs and no image can be pulled.

Knows how to make a base image and how to call podman and podman-compose, each within a time limit; knows nothing of
Tandem. The base image stays in podman's storage as a cache; a new one is made when the package's requirements change.
"""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support.requirements import PYPROJECT, declared_requirements

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
DEBIAN_RELEASE = "bookworm"
BASE_PYTHON = "3.11"
TOOLS = {
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "aardvark-dns": "aardvark-dns",
    "curl": "curl",
}
"""Program -> the Debian package that has it."""
TOOL_PATHS = ("/usr/lib/podman", "/usr/sbin", "/usr/local/sbin")

LABEL = "tandem.compose-test"
"""A label on every image that is built here, which tells old ones from other people's."""
CACHE_AGE = "12h"

CONTAINERS_CONF = """\
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=1024:4096", "nproc=1024:2048"]
"""

# Older podmans than 4.4, such as Debian's, know no start_interval, and podman-compose then waits for ever.
OVERRIDES = """\
services:
  worker: {healthcheck: {start_interval: !reset null}}
  scheduler: {healthcheck: {start_interval: !reset null}}
  gateway: {healthcheck: {start_interval: !reset null}}
"""


class EngineError(Exception):
    """The engine is missing or failed; the text says what went wrong."""


def run(command: Sequence[str], timeout_s: float, *, environment: dict[str, str] | None = None) -> str:
    """Returns the command's output; raises EngineError if it fails or takes too long."""
    try:
        done = subprocess.run(command, env=environment, timeout=timeout_s, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"took more than {timeout_s:g} s: {' '.join(command)}") from error
    if done.returncode != 0:
        raise EngineError(f"exit status {done.returncode}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def install_missing_tools() -> None:
    search_path = os.pathsep.join((os.environ["PATH"], *TOOL_PATHS))
    packages = [package for program, package in TOOLS.items() if shutil.which(program, path=search_path) is None]
    if not packages:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise EngineError(f"missing: {' '.join(packages)}; install them first")
    print(f"installing {' '.join(packages)}")
    run(["apt-get", "update", "-qq"], 120)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], 300)


class Engine:
    """podman and podman-compose for one compose project."""

    def __init__(self, project: str, folder: Path, variables: dict[str, str]) -> None:
        """folder is for scratch files; variables are the ones that docker-compose.yml reads from the environment."""
        config = folder / "containers.conf"
        config.write_text(CONTAINERS_CONF)
        self._overrides = folder / "overrides.yml"
        self._overrides.write_text(OVERRIDES)
        self.project = project
        self._environment = {**os.environ, **variables, "CONTAINERS_CONF": str(config)}

    def podman(self, *arguments: str, timeout_s: float = 30) -> str:
        return run(["podman", "--runtime", "runc", *arguments], timeout_s, environment=self._environment).strip()

    def compose(self, *arguments: str, timeout_s: float = 60) -> str:
        command = [sys.executable, "-m", "podman_compose", "--podman-args=--runtime=runc", "--in-pod", "false"]
        command += [
            "-f",
            str(REPOSITORY / "docker-compose.yml"),
            "-f",
            str(self._overrides),
            "-p",
            self.project,
            *arguments,
        ]
        return run(command, timeout_s, environment=self._environment)

    def container(self, service: str) -> str:
        return f"{self.project}_{service}_1"

    def inspect(self, service: str, template: str) -> str:
        return self.podman("inspect", "--format", template, self.container(service))

    def is_healthy(self, service: str) -> bool:
        """Runs the service's health check now: podman leaves that to systemd timers, which may not be there."""
        try:
            self.podman("healthcheck", "run", self.container(service))
        except EngineError:
            return False
        return True

    def leftovers(self) -> list[str]:
        """Containers, networks and volumes of the project that are still there."""
        own = ("--filter", f"name={self.project}_", "--format")
        found = self.podman("ps", "--all", *own, "{{.Names}}").split()
        found += self.podman("network", "ls", *own, "{{.Name}}").split()
        return found + self.podman("volume", "ls", *own, "{{.Name}}").split()

    def remove(self, services: Sequence[str]) -> None:
        """Removes all of the project but the base image and the build's fresh layers, which are kept as a cache."""
        self.compose("down", "--volumes", "--timeout", "10", timeout_s=90)
        for service in services:
            # More than a gigabyte to delete, which a busy disk takes a while for.
            self.podman("image", "rm", "--ignore", f"localhost/{self.project}_{service}", timeout_s=120)
        self.podman("image", "prune", "--force", "--filter", f"label={LABEL}", "--filter", f"until={CACHE_AGE}")

    def base_image(self) -> str:
        """The name of an image of Debian with Python, and wheels in place of an index; made if there is none."""
        debian = f"localhost/tandem-test-debian:{DEBIAN_RELEASE}"
        digest = hashlib.sha256("\n".join([*requirements(), CONSTRAINTS.read_text()]).encode()).hexdigest()
        base = f"localhost/tandem-test-base:{digest[:16]}"
        if not self._has_image(debian):
            print(f"making {debian}", flush=True)
            with tempfile.TemporaryDirectory(prefix="tandem-debian-") as root:
                include = "--include=python3,python3-venv,ca-certificates"
                run(["debootstrap", "--variant=minbase", include, DEBIAN_RELEASE, root], 400)
                run(["tar", "-C", root, "-cf", f"{root}.tar", "."], 60)
                try:
                    self.podman("import", f"{root}.tar", debian, timeout_s=120)
                finally:
                    Path(f"{root}.tar").unlink()
        if not self._has_image(base):
            print(f"making {base}", flush=True)
            # Newer ones may be another checkout's, which is being tested too.
            old = ("--filter", f"label={LABEL}", "--filter", f"until={CACHE_AGE}")
            self.podman("image", "prune", "--all", "--force", *old, timeout_s=120)
            with tempfile.TemporaryDirectory(prefix="tandem-base-") as folder:
                download_wheels(Path(folder, "wheels"))
                Path(folder, "Dockerfile").write_text(
                    f"FROM {debian}\nLABEL {LABEL}=1\nCOPY wheels /wheels\nENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels\n"
                )
                self.podman("build", "--tag", base, folder, timeout_s=200)
        return base

    def image_size(self, name: str) -> int:
        """In bytes, with all layers."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", name))

    def _has_image(self, name: str) -> bool:
        try:
            self.podman("image", "exists", name)
        except EngineError:
            return False
        return True


def requirements() -> list[str]:
    """What building the package and installing it for each image that is built here takes."""
    extras = (declared_requirements(extra) for extra in ("worker", "smg", "otel"))
    return sorted({*itertools.chain(*extras), *PYPROJECT["build-system"]["requires"], "wheel"})


def download_wheels(folder: Path) -> None:
    """Fetches the requirements' wheels with this machine's pip and its settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    command += ["--only-binary", ":all:", "--python-version", BASE_PYTHON, "--constraint", str(CONSTRAINTS)]
    run([*command, *requirements()], 500)
