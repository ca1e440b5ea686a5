"""A Prometheus of one's own with the configuration of deploy/observability, and the panels of its Grafana dashboard.

Knows how to ask both; what is right is for the tests to say. Needs Debian's package `prometheus`.
"""

import copy
import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "deploy" / "observability"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "tandem.json"
START_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 20
UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}

Labels = dict[str, str]


@dataclass(frozen=True)
class Panel:
    """What a panel of the dashboard shows. Its queries are by legend, as they are in the file."""

    row: str
    title: str
    unit: str
    maximum: float | None
    queries: dict[str, str]
    is_instant: bool


def panels(dashboard: Path = DASHBOARD) -> Iterator[Panel]:
    row = ""
    for panel in json.loads(dashboard.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        targets = panel["targets"]
        queries = {target["legendFormat"]: target["expr"] for target in targets}
        look = panel["fieldConfig"]["defaults"]
        is_instant = all(target.get("instant") for target in targets)
        yield Panel(row, panel["title"], look["unit"], look.get("max"), queries, is_instant)


def annotations(speed: float, dashboard: Path = DASHBOARD) -> dict[str, str]:
    """The queries of events by their names, with windows divided by speed."""
    listed = json.loads(dashboard.read_text())["annotations"]["list"]
    return {each["name"]: faster_windows(each["expr"], speed) for each in listed}


def as_grafana_asks(query: str, rate_interval_s: float = 0, range_s: float = 0) -> str:
    """The query with Grafana's variables replaced: all schedulers, and these windows."""
    query = query.replace("$__rate_interval", f"{rate_interval_s * 1000:.0f}ms")
    return query.replace("$__range", f"{range_s * 1000:.0f}ms").replace("$instance", ".*")


def legend_of(legend: str, labels: Labels) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


class Prometheus:
    """The process, scraping other targets than the file's, with all times but those of the targets divided by speed."""

    def __init__(self, folder: Path, targets: Mapping[str, str], speed: float = 10.0) -> None:
        """folder is for configuration, data and log. targets: host:port by the job's name; other jobs are left out."""
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
        (folder / "alerts.yml").write_text(yaml.safe_dump(faster_rules(rules, speed)))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(local_config(config, targets, speed)))
        self.speed = speed
        self.scrape_interval_s = seconds(config["global"]["scrape_interval"]) / speed
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.log_file = folder / "prometheus.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus does not run: {self.log_file.read_text()}")
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=REQUEST_TIMEOUT_S)
            except OSError:
                time.sleep(0.1)
            else:
                return

    def query(self, query: str, at: float | None = None) -> list[tuple[Labels, float]]:
        """The series of a query and their values, at a Unix time in seconds or now."""
        found = self._get("query", {"query": query} | ({} if at is None else {"time": at}))
        assert found["resultType"] == "vector", f"not a vector: {query}"
        return [(series["metric"], float(series["value"][1])) for series in found["result"]]

    def query_range(
        self, query: str, start: float, end: float, step_s: float
    ) -> list[tuple[Labels, list[tuple[float, float]]]]:
        """The series of a query, each with pairs of Unix time and value."""
        found = self._get("query_range", {"query": query, "start": start, "end": end, "step": step_s})
        return [
            (series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in found["result"]
        ]

    def value(self, query: str) -> float | None:
        """The sum of a query's series now; None if there is none."""
        values = [value for _, value in self.query(query)]
        return sum(values) if values else None

    def firing(self) -> set[str]:
        """The names of alerts that fire now."""
        alerts = self._get("alerts", {})["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def rules(self) -> dict[str, Any]:
        """The alerts' rules by name, with their health and last error."""
        groups = self._get("rules", {})["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _get(self, what: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        body = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{what}", body, REQUEST_TIMEOUT_S) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"Prometheus refuses {parameters}: {error.read().decode()}") from error
        return dict(answer["data"])


def seconds(duration: str) -> float:
    """Of a duration such as 30s; Prometheus' others, such as 1m30s, are not used here."""
    return float(duration[:-1]) * UNITS_S[duration[-1]]


def faster(duration: str, speed: float) -> str:
    return f"{seconds(duration) / speed * 1000:.0f}ms"


def faster_windows(query: str, speed: float) -> str:
    return re.sub(r"\[(\w+)\]", lambda match: f"[{faster(match[1], speed)}]", query)


def local_config(config: dict[str, Any], targets: Mapping[str, str], speed: float) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for name in ("scrape_interval", "evaluation_interval"):
        config["global"][name] = config["global"][name] and faster(config["global"][name], speed)
    # A scrape may take as long as it takes on a busy machine, but no longer than the interval.
    config["global"]["scrape_timeout"] = config["global"]["scrape_interval"]
    jobs = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    assert {job["job_name"] for job in jobs} == set(targets), "a job is missing in prometheus.yml"
    for job in jobs:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    config["scrape_configs"] = jobs
    return config


def faster_rules(rules: dict[str, Any], speed: float) -> dict[str, Any]:
    rules = copy.deepcopy(rules)
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = faster_windows(rule["expr"], speed)
        if "for" in rule:
            rule["for"] = faster(rule["for"], speed)
    return rules
