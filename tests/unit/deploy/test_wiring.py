"""Whether the pods of deploy/kubernetes find each other, and outlive each other as Tandem promises.

Settings are read by the services' own code.
"""

import re

import pytest
import yaml

from tandem.internal.v1 import worker_pb2
from tandem.v1 import inference_pb2
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.host.supervisor import STOP_LIMIT_S
from tests.unit.deploy.manifests import (
    OVERLAYS,
    Object,
    Pods,
    budget_s,
    build,
    named,
    on_linux,
    pods_of,
    services,
    settings_of,
)

END_S = 10
"""What a process is given to end after its drain, or after its supervisor has killed it."""
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name

pytestmark = on_linux
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def scheduler_pods(overlay: str) -> Pods:
    [pods] = services(build(overlay), SchedulerSettings)
    return pods


def worker_pods(overlay: str) -> Pods:
    """Those that serve: of several hosts, the leader's."""
    return services(build(overlay), WorkerSettings)[0]


def scheduler_settings(overlay: str, pod_index: int = 0) -> SchedulerSettings:
    settings = settings_of(scheduler_pods(overlay), build(overlay), pod_index)
    assert isinstance(settings, SchedulerSettings)
    return settings


def worker_settings(overlay: str) -> WorkerSettings:
    settings = settings_of(worker_pods(overlay), build(overlay))
    assert isinstance(settings, WorkerSettings)
    return settings


def smg(overlay: str) -> list[Pods]:
    return [pods for pods in pods_of(build(overlay)) if pods.program == "smg"]


def pod_names(pods: Pods, objects: tuple[Object, ...]) -> list[str]:
    """What the pods are called in the cluster's DNS, also before they are ready."""
    # LeaderWorkerSet takes the service of its own name.
    service = pods.owner["spec"].get("serviceName", pods.name)
    spec = named(objects, "Service")[service]["spec"]
    assert pods.selected_by(spec["selector"]) and spec["clusterIP"] == "None" and spec["publishNotReadyAddresses"]
    return [f"{name}.{service}" for name in pods.names]


@every_overlay
def test_both_services_have_the_same_model_and_secret(overlay: str) -> None:
    worker, scheduler = worker_settings(overlay), scheduler_settings(overlay)
    assert (worker.model, worker.session_secret_file) == (scheduler.model, scheduler.session_secret_file)
    assert worker.model != WorkerSettings().model or overlay == "cpu"
    assert (worker.host, scheduler.host) == ("0.0.0.0", "0.0.0.0")


@every_overlay
def test_each_scheduler_finds_the_worker_of_its_number(overlay: str) -> None:
    port, num_schedulers = worker_settings(overlay).port, len(scheduler_pods(overlay).names)
    found = [scheduler_settings(overlay, index).worker_address for index in range(num_schedulers)]
    assert found == [f"{name}:{port}" for name in pod_names(worker_pods(overlay), build(overlay))]


@every_overlay
def test_gateways_find_the_schedulers(overlay: str) -> None:
    schedulers, port = scheduler_pods(overlay), scheduler_settings(overlay).port
    service = named(build(overlay), "Service")[schedulers.name]["spec"]
    # Requests wait for a lost worker, without which the scheduler is not ready.
    assert schedulers.selected_by(service["selector"]) and service["publishNotReadyAddresses"]
    assert "clusterIP" not in service and [each["port"] for each in service["ports"]] == [port]
    gateways = services(build(overlay), GatewaySettings)
    assert bool(gateways) != bool(smg(overlay))
    for gateway in gateways:
        settings = settings_of(gateway, build(overlay))
        assert isinstance(settings, GatewaySettings)
        assert settings.scheduler_address == f"{schedulers.name}:{port}"
    for gateway in smg(overlay):
        command = gateway.container["command"]
        urls = [f"grpc://{name}:{port}" for name in pod_names(schedulers, build(overlay))]
        assert len(urls) == 2 and command[command.index("--worker-urls") + 1 :] == urls
        assert scheduler_settings(overlay).vllm_engine_service


@every_overlay
def test_ports_are_those_that_the_programs_listen_on(overlay: str) -> None:
    for pods in pods_of(build(overlay)):
        if pods.program == "smg":
            assert f"--port={pods.ports['http']}" in pods.container["command"]
        elif pods.ports:
            settings = settings_of(pods, build(overlay))
            if isinstance(settings, GatewaySettings):
                assert pods.ports["http"] == settings.http_port
            else:
                assert pods.ports["grpc"] == settings.port
                assert pods.ports["health"] == settings.health_port
                assert pods.ports["metrics"] == settings.metrics_port
                scraped = pods.template["metadata"]["annotations"]
                assert scraped == {"prometheus.io/scrape": "true", "prometheus.io/port": str(settings.metrics_port)}
        for probe in pods.probes.values():
            if "grpc" in probe:
                # The port that speaks no TLS.
                assert probe["grpc"]["port"] == pods.ports["health"]
            else:
                assert probe["httpGet"]["port"] in pods.ports


@every_overlay
def test_services_lead_to_ports_of_one_kind_of_pod(overlay: str) -> None:
    for service in named(build(overlay), "Service").values():
        [pods] = [pods for pods in pods_of(build(overlay)) if pods.selected_by(service["spec"]["selector"])]
        for port in service["spec"]["ports"]:
            own = pods.ports[port["targetPort"]]
            # Clients of a service without an address of its own reach the container's port, whatever is written here.
            assert service["spec"].get("clusterIP") != "None" or port["port"] == own


@every_overlay
def test_callers_show_a_key_or_come_from_smg_alone(overlay: str) -> None:
    """No schema and no setting knows that a scheduler that asks for no key is behind a policy."""
    policies = named(build(overlay), "NetworkPolicy")
    if not smg(overlay):
        assert scheduler_settings(overlay).api_key_file and not scheduler_settings(overlay).insecure
        for gateway in services(build(overlay), GatewaySettings):
            settings = settings_of(gateway, build(overlay))
            assert isinstance(settings, GatewaySettings)
            assert settings.api_key_file and not settings.insecure
        return
    policy, [gateway] = policies["tandem-scheduler"]["spec"], smg(overlay)
    assert scheduler_pods(overlay).selected_by(policy["podSelector"]["matchLabels"])
    assert policy["policyTypes"] == ["Ingress"]
    [from_smg, from_all] = policy["ingress"]
    assert from_smg["ports"] == [{"port": "grpc"}] and from_all["ports"] == [{"port": "health"}, {"port": "metrics"}]
    [source] = from_smg["from"]
    selected = [pods for pods in pods_of(build(overlay)) if pods.selected_by(source["podSelector"]["matchLabels"])]
    assert selected == [gateway] and "--api-key=$(SMG_API_KEY)" in gateway.container["command"]


@every_overlay
def test_probes_ask_for_the_services_by_their_names(overlay: str) -> None:
    def asked(pods: Pods) -> dict[str, str]:
        return {name: probe["grpc"].get("service", "") for name, probe in pods.probes.items()}

    assert asked(worker_pods(overlay)) == dict.fromkeys(("startupProbe", "livenessProbe", "readinessProbe"), WORKER)
    # Without a worker the inference service does not serve, which is no reason to end the streams that wait for one.
    server = {"startupProbe": "", "livenessProbe": ""}
    assert asked(scheduler_pods(overlay)) == {**server, "readinessProbe": INFERENCE}


@every_overlay
def test_a_worker_has_the_time_to_come_back(overlay: str) -> None:
    workers = worker_pods(overlay)
    starting_s = budget_s(workers.probes["startupProbe"])
    assert scheduler_settings(overlay).worker_wait_s >= starting_s
    if workers.program == "tandem-worker":
        # Its supervisor starts the next worker in the same container, and that one loads before it answers.
        assert budget_s(workers.probes["livenessProbe"]) >= starting_s


@every_overlay
def test_each_service_has_pods_of_its_own(overlay: str) -> None:
    objects = build(overlay)
    owners = [services(objects, each)[0].owner for each in (SchedulerSettings, WorkerSettings)]
    assert owners[0] is not owners[1]
    for pods in pods_of(objects):
        assert len(pods.spec["containers"]) == 1 and "initContainers" not in pods.spec


def test_other_workers_leave_the_schedulers_pod_as_it_is() -> None:
    """What differs is the name of the settings that both share, which the model is in."""
    one, other, third = (
        re.sub(r"tandem-\w{10}\b", "tandem", yaml.safe_dump(scheduler_pods(overlay).template))
        for overlay in ("base", "tensor-parallel", "multi-host")
    )
    assert one == other == third


@every_overlay
def test_pods_have_the_time_to_drain(overlay: str) -> None:
    for pods in pods_of(build(overlay)):
        if pods.program == "smg":
            [drain_s] = re.findall(r"--shutdown-grace-period-secs=(\d+)", " ".join(pods.container["command"]))
        else:
            settings = settings_of(pods, build(overlay))
            drain_s = STOP_LIMIT_S if isinstance(settings, WorkerSettings) else settings.drain_grace_s
        sleep_s = pods.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pods.spec["terminationGracePeriodSeconds"] >= sleep_s + float(drain_s) + END_S
        # Where a Service has other pods too, it must forget the one that ends before that one stops listening.
        assert (sleep_s > 0) == (pods.owner["kind"] == "Deployment")


@every_overlay
def test_every_rank_has_a_gpu(overlay: str) -> None:
    num_ranks = worker_settings(overlay).tp_size
    num_gpus = 0
    for pods in services(build(overlay), WorkerSettings):
        gpus = pods.container["resources"]["limits"].get("nvidia.com/gpu", 0)
        [shm] = [each["emptyDir"] for each in pods.spec["volumes"] if each["name"] == "shm"]
        assert shm["medium"] == "Memory"
        if pods.program == "tandem_worker":
            assert f"--nproc-per-node={gpus}" in pods.container["command"]
            group = pods.owner["spec"]["leaderWorkerTemplate"]
            num_gpus += gpus if pods.names else gpus * (group["size"] - 1)
        else:
            num_gpus += gpus
    if overlay == "cpu":
        assert (num_gpus, num_ranks, worker_settings(overlay).device) == (0, 1, "cpu")
    else:
        assert num_gpus == num_ranks and worker_settings(overlay).device == "cuda"
    assert num_ranks == {"tensor-parallel": 4, "multi-host": 8}.get(overlay, 1)
