"""docker-compose.yml and docker-compose.gpu.yml as podman-compose reads them, and the settings of the services there.

`make compose-test` runs them.
"""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings
from tests.unit.deploy.manifests import ROOT, Settings, read_settings
from tests.unit.deploy.test_wiring import INFERENCE, WORKER

FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]
PROGRAMS = {"worker": "tandem-worker", "scheduler": "tandem-scheduler", "gateway": "tandem-gateway"}
HEALTH = {"worker": ("127.0.0.1:50052", WORKER), "scheduler": ("127.0.0.1:50051", INFERENCE)}


def services(num_files: int, **variables: str) -> dict[str, Any]:
    """The services of the first files, put together."""
    flags = [word for file in FILES[:num_files] for word in ("-f", file)]
    done = subprocess.run(
        [sys.executable, "-m", "podman_compose", *flags, "config"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout)["services"])


def settings_of(service: str, spec: dict[str, Any]) -> Settings:
    assert spec["command"] == [PROGRAMS[service]]
    return read_settings(PROGRAMS[service], [], spec["environment"])


@pytest.mark.parametrize("num_files", [1, 2])
def test_the_services_take_their_settings(num_files: int) -> None:
    specs = services(num_files, MODEL="/models/any", MODEL_DIR="/tmp")
    assert set(specs) == set(PROGRAMS)
    worker, scheduler = (settings_of(service, specs[service]) for service in ("worker", "scheduler"))
    assert isinstance(worker, WorkerSettings) and isinstance(scheduler, SchedulerSettings)
    assert worker.model == scheduler.model == "/models/any"
    assert worker.session_secret_file == scheduler.session_secret_file != ""
    assert scheduler.worker_address == f"worker:{worker.port}"
    gateway = settings_of("gateway", specs["gateway"])
    assert isinstance(gateway, GatewaySettings) and gateway.scheduler_address == f"scheduler:{scheduler.port}"
    for service, (address, name) in HEALTH.items():
        assert specs[service]["healthcheck"]["test"][-2:] == [address, name]


@pytest.mark.parametrize("num_files", [1, 2])
def test_the_services_are_confined(num_files: int) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    for service, spec in services(num_files).items():
        assert spec["read_only"] and spec["cap_drop"] == ["ALL"]
        assert spec["security_opt"] == ["no-new-privileges:true"]
        assert {"max-size", "max-file"} == set(spec["logging"]["options"])
        assert spec["environment"]["HOME"] == "/tmp" and [each.partition(":")[0] for each in spec["tmpfs"]] == ["/tmp"]
        assert spec["healthcheck"]["start_interval"] == "1s"
        assert spec["build"]["target"] in targets
        # Nobody is asked for a key, so nobody else may come.
        assert all(port.startswith("127.0.0.1:") for port in spec.get("ports", [])), service


def test_a_worker_with_gpus() -> None:
    worker = services(2, TP_SIZE="2")["worker"]
    settings = settings_of("worker", worker)
    assert isinstance(settings, WorkerSettings)
    assert (settings.device, settings.tp_size, worker["build"]["target"]) == ("cuda", 2, "worker-cuda")
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], int(device["count"]), device["capabilities"]) == ("nvidia", 2, ["gpu"])
    assert (worker["shm_size"], worker["ipc"]) == ("8gb", "private")
    on_cpu = services(1)
    assert {name: spec for name, spec in services(2).items() if name != "worker"} == {
        name: spec for name, spec in on_cpu.items() if name != "worker"
    }
