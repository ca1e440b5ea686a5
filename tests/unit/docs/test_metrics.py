"""The metrics that docs/metrics.md lists are those that there are."""

import re
from pathlib import Path

from tandem_scheduler.observers.definitions import SCHEDULER_METRICS

DOCS = Path(__file__).parents[3] / "docs"
ROW = re.compile(r"^\| `(\w+)`(?: `\{([^}]*)\}`)? \| (counter|gauge|histogram) \| (.+) \|$", re.MULTILINE)


def test_every_metric_has_its_row() -> None:
    listed = [
        (name.removesuffix("_total") if kind == "counter" else name, kind, text, labels)
        for name, labels, kind, text in ROW.findall((DOCS / "metrics.md").read_text())
    ]
    assert listed == [(each.name, each.kind, each.text, ", ".join(each.labels)) for each in SCHEDULER_METRICS]
