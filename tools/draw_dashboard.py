"""Draws docs/images/dashboard.svg: the panels of the Grafana dashboard, from a Prometheus that scrapes services of this
machine while they are under load and their worker is killed. Grafana draws otherwise, but asks the same queries.

Needs Debian's package `prometheus`. Usage: python -m tools.draw_dashboard
"""

import io
import math
import re
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.e2e.observed import Load, Site, observed_site
from tests.e2e.waiting import wait_until
from tools.prometheus import Panel, annotations, as_grafana_asks, legend_of, panels

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "dashboard.svg"
NUM_COLUMNS = 4
MIN_ANSWERS = 30
"""How many answers come before the worker is killed, and after it."""
IDLE_S = 4.0
UNITS = {
    "s": ("s", 1.0),
    "bytes": ("B", 1.0),
    "percentunit": ("%", 100.0),
    "reqps": ("1/s", 1.0),
    "ops": ("1/s", 1.0),
    "short": ("", 1.0),
}
"""What Grafana's units are called here, and the factor."""
COLOURS = ("#30638e", "#d1495b", "#edae49", "#66a182", "#9a77b8")


@dataclass
class Drawn:
    """A panel and its series: legend, and pairs of seconds since the start and value."""

    panel: Panel
    series: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)


def main() -> None:
    with observed_site() as site:
        start = time.time()
        time.sleep(IDLE_S)
        load = Load(site)
        load.wait_answers(MIN_ANSWERS)
        site.kill_worker()
        wait_until(lambda: site.engine.load().num_worker_losses == 1, "the loss is seen")
        load.wait_answers(MIN_ANSWERS)
        load.end()
        time.sleep(IDLE_S)
        end = time.time()
        drawn = [read(site, panel, start, end) for panel in panels()]
        [losses] = (query for query in annotations(site.prometheus.speed).values())
        found = site.prometheus.query_range(as_grafana_asks(losses), start, end, site.prometheus.scrape_interval_s)
        lost_at = min(at - start for _, values in found for at, _ in values)
    draw(drawn, lost_at, end - start)


def read(site: Site, panel: Panel, start: float, end: float) -> Drawn:
    prometheus = site.prometheus
    drawn, step_s = Drawn(panel), 2 * prometheus.scrape_interval_s
    for legend, query in panel.queries.items():
        query = as_grafana_asks(query, 2 * step_s, end - start)
        found = prometheus.query_range(query, end if panel.is_instant else start, end, step_s)
        drawn.series += [
            # The ports of this machine's processes say nothing.
            (legend_of(legend, labels | {"instance": ""}).strip(), [(at - start, value) for at, value in values])
            for labels, values in found
        ]
    return drawn


def draw(drawn: list[Drawn], lost_at: float, length_s: float) -> None:
    rows = [(title, list(group)) for title, group in groupby(drawn, lambda each: each.panel.row)]
    lines = [
        (title if at == 0 else f"{title}, continued", group[at : at + NUM_COLUMNS])
        for title, group in rows
        for at in range(0, len(group), NUM_COLUMNS)
    ]
    style = {"svg.fonttype": "none", "svg.hashsalt": "dashboard", "font.size": 7, "font.sans-serif": ["DejaVu Sans"]}
    with pyplot.rc_context(style):
        figure = Figure(figsize=(12, 1.75 * len(lines)))
        for subfigure, (title, group) in zip(figure.subfigures(len(lines), 1), lines, strict=True):
            subfigure.suptitle(title, x=0.03, y=0.99, ha="left", fontsize=8, fontweight="bold")
            all_axes = subfigure.subplots(1, NUM_COLUMNS)
            subfigure.subplots_adjust(left=0.03, right=0.99, top=0.77, bottom=0.3, wspace=0.2)
            for axes, each in zip(all_axes, group, strict=False):
                draw_panel(axes, each, lost_at, length_s)
            for axes in all_axes[len(group) :]:
                axes.set_axis_off()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    IMAGE.write_text(re.sub(r"<[^>]+>", rounded, text.getvalue()))
    print(f"{IMAGE}: {IMAGE.stat().st_size / 1000:.0f} kB")


def rounded(tag: "re.Match[str]") -> str:
    """A tag's numbers in tenths of a point, which is finer than anybody sees."""
    return re.sub(r"(\.\d)\d+", r"\1", tag[0])


def draw_panel(axes: Axes, drawn: Drawn, lost_at: float, length_s: float) -> None:
    panel = drawn.panel
    numbers = [value for _, values in drawn.series for _, value in values if not math.isnan(value)]
    unit, factor = UNITS[panel.unit]
    if panel.unit == "bytes" and max(numbers) > 1e6:
        unit, factor = "MB", 1e-6
    axes.set_title(panel.title + (f" [{unit}]" if unit else ""), fontsize=7, loc="left")
    if panel.is_instant:
        text = ", ".join(f"{name} {values[-1][1] * factor:.2f} {unit}" for name, values in drawn.series)
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    for (name, values), colour in zip(drawn.series, COLOURS, strict=False):
        # Where a series is no number, its line has a gap.
        axes.plot([at for at, _ in values], [value * factor for _, value in values], label=name, color=colour, lw=1)
    axes.axvline(lost_at, color="#888888", ls=":", lw=0.8)
    axes.set_xlim(0, length_s)
    axes.set_ylim(0, None if max(numbers) > 0 else 1)
    axes.locator_params(nbins=4)
    axes.spines[["top", "right"]].set_visible(False)
    if any(name for name, _ in drawn.series):
        axes.legend(fontsize=6, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(-0.04, -0.16))


if __name__ == "__main__":
    main()
