"""The containers of deploy/kubernetes/cpu as processes, with their commands, variables and Secrets, under their probes.

Each pod has a loopback address of its own in a network of the test's own, so the manifests' ports are right. Variables
have addresses in place of names, and the test's folder in place of what is mounted; nothing else is changed.
"""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings
from tests.e2e.hosts import PROGRAMS, entering, network_namespaces, why_no_hosts
from tests.e2e.waiting import WAIT_S, wait_until
from tests.support.programs import require_programs
from tests.unit.deploy.manifests import Pods, build, environment_of, on_linux, secrets, services

OVERLAY = "cpu"
WORKER, SCHEDULER, GATEWAY = "127.0.0.2", "127.0.0.3", "127.0.0.4"
ADDRESSES = {"tandem-worker-0.tandem-worker": WORKER, "tandem-scheduler": SCHEDULER}
NUM_TOKENS = 300

pytestmark = [pytest.mark.slow, on_linux]


class Pod:
    """The only container of a pod, as a process."""

    def __init__(self, enter: list[str], pods: Pods, address: str, folder: Path) -> None:
        """enter: the words that run a command in the test's network."""
        self.pods = pods
        self._enter = enter
        self._address = address
        self._folder = folder
        self._variables = {"PATH": os.environ["PATH"], **environment_of(pods, build(OVERLAY)), "TANDEM_HOST": address}
        for name, other in ADDRESSES.items():
            self._replace(f"{name}:", f"{other}:")
        self._replace("/tmp", str(folder))
        self._mount_secrets()
        self.start()

    def _replace(self, old: str, new: str) -> None:
        for name, value in self._variables.items():
            if name != "PATH" and value.startswith(old):
                self._variables[name] = new + value.removeprefix(old)

    def _mount_secrets(self) -> None:
        paths = {mount["name"]: mount["mountPath"] for mount in self.pods.container["volumeMounts"]}
        for volume in self.pods.spec["volumes"]:
            if "secret" in volume:
                place = self._folder / volume["name"]
                place.mkdir(exist_ok=True)
                for key, value in secrets()[volume["secret"]["secretName"]]["data"].items():
                    (place / key).write_bytes(base64.b64decode(value))
                self._replace(paths[volume["name"]], str(place))

    def start(self) -> None:
        program, *arguments = self.pods.container["command"]
        with (self._folder / f"{self.pods.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._enter, str(Path(sys.executable).with_name(program)), *arguments],
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def passes(self, name: str) -> bool:
        """Whether the container passes a probe now."""
        probe = self.pods.probes[name]
        if "grpc" in probe:
            address = f"{self._address}:{probe['grpc']['port']}"
            module = [sys.executable, "-m", "tandem_shared.rpc.health_probe"]
            command = [*module, address, probe["grpc"].get("service", "")]
        else:
            port = self.pods.ports[probe["httpGet"]["port"]]
            command = ["curl", "--silent", "--fail", f"http://{self._address}:{port}{probe['httpGet']['path']}"]
        return subprocess.run([*self._enter, *command], capture_output=True, timeout=WAIT_S).returncode == 0

    def wait_ready(self) -> None:
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            wait_until(
                lambda name=name: self.process.poll() is not None or self.passes(name), f"{self.pods.name} {name}"
            )
        assert self.process.poll() is None

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


class Cluster:
    def __init__(self, holder: int, folder: Path) -> None:
        self.enter = entering(holder)
        subprocess.run([*self.enter, "ip", "link", "set", "lo", "up"], check=True)
        self.folder = folder
        self.pods: list[Pod] = []

    def pod(self, kind: Any, address: str) -> Pod:
        [pods] = services(build(OVERLAY), kind)
        self.pods.append(Pod(self.enter, pods, address, self.folder))
        return self.pods[-1]

    def complete(self, *flags: str, **fields: Any) -> subprocess.Popen[str]:
        """curl, asking the gateway for a completion."""
        body = {"prompt": "First Citizen:\n", "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, **fields}
        url = f"http://{GATEWAY}:8000/v1/completions"
        command = ["curl", "--silent", "--no-buffer", *flags, "--json", json.dumps(body), url]
        return subprocess.Popen([*self.enter, *command], stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        for pod in self.pods:
            pod.process.kill()
            pod.process.wait()
        for log in self.folder.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text()}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    require_programs(*PROGRAMS, "curl")
    if obstacle := why_no_hosts():
        pytest.skip(obstacle)
    with network_namespaces(1) as [holder]:
        cluster = Cluster(holder, tmp_path)
        try:
            yield cluster
        finally:
            cluster.close()


def test_a_workers_pod_goes_and_comes_under_a_stream(cluster: Cluster) -> None:
    worker, scheduler = cluster.pod(WorkerSettings, WORKER), cluster.pod(SchedulerSettings, SCHEDULER)
    gateway = cluster.pod(GatewaySettings, GATEWAY)
    for pod in cluster.pods:
        pod.wait_ready()

    refused, _ = cluster.complete().communicate(timeout=WAIT_S)
    assert json.loads(refused)["error"]["code"] == "invalid_api_key"

    key = base64.b64decode(secrets()["tandem-api-keys"]["data"]["keys"]).decode().split()[-1]
    authorization = ["--header", f"Authorization: Bearer {key}"]
    stream = cluster.complete(*authorization, stream=True, stream_options={"include_usage": True})
    assert stream.stdout is not None and stream.stdout.readline().startswith("data: ")
    worker.end(signal.SIGKILL)
    wait_until(lambda: not scheduler.passes("readinessProbe"), "the scheduler is not ready")
    # The kubelet would leave both alone, and clients would still be led to them.
    assert scheduler.passes("livenessProbe") and gateway.passes("livenessProbe") and gateway.passes("readinessProbe")
    waiting = cluster.complete(*authorization, max_tokens=5)
    worker.start()
    worker.wait_ready()
    output, _ = stream.communicate(timeout=WAIT_S)
    events = [json.loads(line.removeprefix("data: ")) for line in output.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    answer, _ = waiting.communicate(timeout=WAIT_S)
    assert json.loads(answer)["usage"]["completion_tokens"] == 5

    for pod in (gateway, scheduler, worker):
        assert pod.end(signal.SIGTERM) == 0, pod.pods.name
