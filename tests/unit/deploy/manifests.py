"""deploy/kubernetes as kubectl builds it, and what its containers would read there."""

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from tandem_shared.config import SchedulerSettings, WorkerSettings, read_command_line
from tandem_shared.gateway_settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "kubernetes"
KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted(path.parent.name for path in FOLDER.glob("*/kustomization.yaml"))
SETTINGS = {
    "tandem-scheduler": SchedulerSettings,
    "tandem-worker": WorkerSettings,
    "tandem_worker": WorkerSettings,  # under torchrun, as a module
    "tandem-gateway": GatewaySettings,
}
Object = dict[str, Any]
Settings = SchedulerSettings | WorkerSettings | GatewaySettings


on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="the extra dev brings kubectl for Linux alone")


def kubectl(*arguments: str) -> list[Object]:
    """What kubectl prints, which asks no cluster here."""
    command = [str(KUBECTL), *arguments]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@functools.cache
def build(overlay: str) -> tuple[Object, ...]:
    return tuple(kubectl("kustomize", overlay))


@functools.cache
def secrets() -> dict[str, Object]:
    """The Secrets that the commands of docs/deployment.md make."""
    text = (ROOT / "docs" / "deployment.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^kubectl (create secret .*)$", text, re.MULTILINE)
    environment = {**os.environ, "PATH": f"{KUBECTL.parent}{os.pathsep}{os.environ['PATH']}"}
    objects = []
    for command in commands:
        shell = ["bash", "-euo", "pipefail", "-c", f"kubectl {command} --dry-run=client -o yaml"]
        made = subprocess.run(shell, capture_output=True, text=True, timeout=60, env=environment, cwd=FOLDER)
        assert made.returncode == 0, made.stderr
        objects += list(yaml.safe_load_all(made.stdout))
    return {each["metadata"]["name"]: each for each in objects}


def named(objects: tuple[Object, ...], kind: str) -> dict[str, Object]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


@dataclass(frozen=True)
class Pods:
    """The pods of one template."""

    owner: Object
    template: Object
    names: tuple[str, ...] = ()
    """Empty where the names are not fixed."""

    @property
    def name(self) -> str:
        return str(self.owner["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"].get("labels", {}))

    @property
    def spec(self) -> Object:
        return dict(self.template["spec"])

    @property
    def container(self) -> Object:
        [container] = self.spec["containers"]
        return dict(container)

    def selected_by(self, selector: dict[str, str]) -> bool:
        return selector.items() <= self.labels.items()

    @property
    def program(self) -> str:
        """What the container runs: the command, or torchrun's module."""
        command = self.container["command"]
        return str(command[command.index("-m") + 1] if "-m" in command else command[0])

    @property
    def probes(self) -> dict[str, Object]:
        return {name: probe for name, probe in self.container.items() if name.endswith("Probe")}

    @property
    def ports(self) -> dict[str, int]:
        """The container's ports by their names."""
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}


def pods_of(objects: tuple[Object, ...]) -> Iterator[Pods]:
    for each in objects:
        spec, name = each.get("spec", {}), each["metadata"]["name"]
        match each["kind"]:
            case "StatefulSet":
                yield Pods(each, spec["template"], tuple(f"{name}-{i}" for i in range(spec["replicas"])))
            case "Deployment" | "Job":
                yield Pods(each, spec["template"])
            case "LeaderWorkerSet":
                group = spec["leaderWorkerTemplate"]
                leaders = tuple(f"{name}-{i}" for i in range(spec["replicas"]))
                yield Pods(each, group["leaderTemplate"], leaders)
                yield Pods(each, group["workerTemplate"])


def environment_of(pods: Pods, objects: tuple[Object, ...], pod_index: int = 0) -> dict[str, str]:
    """The container's variables as the kubelet makes them."""
    variables: dict[str, str] = {}
    for source in pods.container.get("envFrom", []):
        variables |= named(objects, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for each in pods.container.get("env", []):
        if "valueFrom" in each:
            assert each["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
            value = str(pod_index)
        else:
            # Only variables that stand before are known.
            value = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], each["value"])
        variables[each["name"]] = value
    return variables


def settings_of(pods: Pods, objects: tuple[Object, ...], pod_index: int = 0) -> Settings:
    command = pods.container["command"]
    return read_settings(
        pods.program, command[command.index(pods.program) + 1 :], environment_of(pods, objects, pod_index)
    )


def read_settings(program: str, arguments: list[str], environment: dict[str, str]) -> Settings:
    """The settings as the program itself would read them, or refuse them."""
    own = {name: value for name, value in environment.items() if name.startswith("TANDEM_")}
    with mock.patch.dict(os.environ, own):
        return read_command_line(SETTINGS[program], program, "", arguments)


def services(objects: tuple[Object, ...], settings_class: type[Settings]) -> list[Pods]:
    """The pods that run one of Tandem's services; of a worker's ranks, the leader's pods first."""
    return [pods for pods in pods_of(objects) if SETTINGS.get(pods.program) is settings_class]


def budget_s(probe: Object) -> float:
    """For how long a probe must fail before it has an effect, in seconds."""
    return float(probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3))
