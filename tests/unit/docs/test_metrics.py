"""The metrics that docs/metrics.md lists are those that there are."""

import re
from pathlib import Path

from tandem_gateway.metrics import GATEWAY_METRICS
from tandem_scheduler.observers.definitions import SCHEDULER_METRICS
from tandem_worker.service.metrics import WORKER_METRICS

DOCS = Path(__file__).parents[3] / "docs"
ROW = re.compile(r"^\| `(\w+)`(?: `\{([^}]*)\}`)? \| (counter|gauge|histogram) \| (.+) \|$", re.MULTILINE)


def test_every_metric_has_its_row() -> None:
    listed = [
        (name.removesuffix("_total") if kind == "counter" else name, kind, text, labels)
        for name, labels, kind, text in ROW.findall((DOCS / "metrics.md").read_text())
    ]
    ours = (*SCHEDULER_METRICS, *WORKER_METRICS, *GATEWAY_METRICS)
    assert listed == [(each.name, each.kind, each.text, ", ".join(each.labels)) for each in ours]
