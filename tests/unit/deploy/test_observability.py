"""deploy/observability: the files fit each other, docker-compose.yml and the metrics that there are.

tests/e2e/test_observability.py runs Prometheus with them.
"""

import json
import re
import subprocess
from typing import Any

import pytest
import yaml

from tandem_gateway.metrics import GATEWAY_METRICS
from tandem_scheduler.observers.definitions import SCHEDULER_METRICS
from tandem_shared.metrics.exposition import Metric
from tandem_worker.service.metrics import WORKER_METRICS
from tests.support.programs import require_programs
from tests.unit.deploy.manifests import ROOT
from tools.prometheus import DASHBOARD, FOLDER, Panel, panels

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
IMAGES = {
    "prometheus": "prom/prometheus",
    "grafana": "grafana/grafana",
    "collector": "otel/opentelemetry-collector",
}
PROCESS_METRICS = {"process_resident_memory_bytes", "up"}
UNITS = {"short", "reqps", "ops", "s", "percentunit", "bytes"}


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / name).read_text()))


def series_of(metric: Metric, prefix: str) -> set[str]:
    name = prefix + metric.name
    kinds = {"counter": {f"{name}_total"}, "gauge": {name}}
    return kinds.get(metric.kind) or {f"{name}_bucket", f"{name}_sum", f"{name}_count"}


KNOWN = {name for metric in (*SCHEDULER_METRICS, *WORKER_METRICS) for name in series_of(metric, "tandem:")}
KNOWN |= {name for metric in GATEWAY_METRICS for name in series_of(metric, "")} | PROCESS_METRICS


def metrics_in(query: str) -> set[str]:
    """Its names of metrics: the words that are neither labels, nor functions, nor what they are grouped by."""
    query = re.sub(r"{[^}]*}|\[[^]]*\]|\bby \([^)]*\)", "", query)
    return set(re.findall(r"\b[a-z][a-z0-9_:]+\b(?! ?\()", query)) - {"and", "sum"}


@pytest.mark.parametrize("panel", list(panels()), ids=lambda panel: panel.title)
def test_panels_ask_for_metrics_that_there_are(panel: Panel) -> None:
    assert panel.queries and all(panel.queries)
    for query in panel.queries.values():
        assert metrics_in(query) and metrics_in(query) <= KNOWN, metrics_in(query) - KNOWN


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    [source] = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["title"] for panel in shown}) == len(shown)
    for panel in shown:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    texts = re.findall(r'"uid": "([^"]*)"', DASHBOARD.read_text())
    assert set(texts) == {dashboard["uid"], source["uid"]}
    # No panel lies on another or beyond the 24 columns.
    cells = [cell for panel in dashboard["panels"] for cell in cells_of(panel["gridPos"])]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) == 23


def cells_of(place: dict[str, int]) -> list[tuple[int, int]]:
    columns = range(place["x"], place["x"] + place["w"])
    return [(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    [source] = read("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    config = read("prometheus.yml")
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    [provider] = read("grafana/provisioning/dashboards/tandem.yml")["providers"]
    mounts = mounts_of("grafana")
    assert mounts[provider["options"]["path"]] == "./deploy/observability/grafana/dashboards"
    for kind in ("datasources", "dashboards"):
        assert mounts[f"/etc/grafana/provisioning/{kind}"] == f"./deploy/observability/grafana/provisioning/{kind}"


def mounts_of(service: str) -> dict[str, str]:
    """The service's folders and volumes by where they are mounted."""
    return {each.split(":")[1]: each.split(":")[0] for each in COMPOSE["services"][service]["volumes"]}


def test_prometheus_scrapes_the_ports_of_the_services() -> None:
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in read("prometheus.yml")["scrape_configs"]}
    ports = {
        name: COMPOSE["services"][name]["environment"]["TANDEM_METRICS_PORT"] for name in ("scheduler", "worker")
    } | {"gateway": COMPOSE["services"]["gateway"]["environment"]["TANDEM_HTTP_PORT"], "collector": "8888"}
    assert targets == {name: [f"{name}:{port}"] for name, port in ports.items()}
    assert mounts_of("prometheus")["/etc/prometheus"] == "./deploy/observability"
    assert "--config.file=/etc/prometheus/prometheus.yml" in COMPOSE["services"]["prometheus"]["command"]


def test_the_collector_takes_what_the_services_send() -> None:
    config = read("collector.yml")
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert pipeline[kind] and set(pipeline[kind]) <= set(config[kind])
    assert config["service"]["pipelines"]["traces"]["processors"][0] == "memory_limiter"
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    [reader] = config["service"]["telemetry"]["metrics"]["readers"]
    assert reader["pull"]["exporter"]["prometheus"] == {"host": "0.0.0.0", "port": 8888}
    assert mounts_of("collector")["/etc/otelcol/config.yaml"] == "./deploy/observability/collector.yml"
    for name in ("scheduler", "gateway"):
        assert COMPOSE["services"][name]["environment"]["TANDEM_OTLP_TRACES_ENDPOINT"] == "${OTLP_TRACES_ENDPOINT:-}"


@pytest.mark.parametrize("name", IMAGES)
def test_the_profile_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == ["observability"]
    assert re.fullmatch(rf"{IMAGES[name]}:v?\d+\.\d+\.\d+", service["image"])
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"max-size", "max-file"} == set(service["logging"]["options"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert all(each.endswith(":ro") for each in service["volumes"] if each.startswith("."))


def test_what_the_profile_adds_is_not_there_without_it() -> None:
    services = COMPOSE["services"]
    assert {name for name, service in services.items() if "profiles" in service} == set(IMAGES)


def test_promtool_takes_configuration_and_alerts() -> None:
    require_programs("promtool")
    for kind, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = subprocess.run(["promtool", "check", kind, name], cwd=FOLDER, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_say_what_to_do() -> None:
    rules = [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert metrics_in(rule["expr"]) <= KNOWN, rule["expr"]
