"""A picture of which part of the system works when in a few decode steps, from the results of benchmarks.gaps."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.common import Report, commit_in, newest, read_reports
from tandem_shared.config import SchedulerSettings

DEPTH = SchedulerSettings().max_plans_in_flight
BATCH = 64
LANES = ("wire, scheduler, wire", "worker prepares, launches", "GPU computes", "worker reads, sends")
STEP_COLOURS = ("#30638e", "#d1495b", "#edae49")
PREPARING_ALPHA = 0.45
LANE_HEIGHT = 0.6

Sample = list[dict[str, float]]
"""Steps that follow one another, as benchmarks.gaps writes them: microseconds."""


def load_samples(folder: Path) -> dict[str, Sample]:
    """The newest sample of each model on a GPU, at the default depth and BATCH rows, by the panel's title."""
    reports = [report for _, report in read_reports(folder, "gaps_*.json")]
    by_model = newest((r["model"], r) for r in reports if r["device"] != "cpu" and sample_in(r))
    return {_title(model, report): sample_in(report) for model, report in sorted(by_model.items())}


def _title(model: str, report: Report) -> str:
    commit = commit_in(report)
    return f"{model} on {report['device']}{f' at {commit}' if commit else ''}"


def sample_in(report: Report) -> Sample:
    """The sample at DEPTH and BATCH; empty if the report has no such case."""
    cases = [case for case in report["cases"] if (case["depth"], case["batch"]) == (DEPTH, BATCH)]
    return cases[0]["sample"] if cases else []


def gpu_spans(sample: Sample) -> list[tuple[float, float]]:
    """Start and end of each step on the GPU, by the worker's clock.

    Durations and gaps are by the GPU's clock. They are placed as late as they can be while no step ends after its
    result was read.
    """
    spans, end = [], 0.0
    for step in sample:
        start = end + step["gpu_idle_us"]
        end = start + step["gpu_duration_us"]
        spans.append((start, end))
    shift = min(step["sampled_us"] - end for step, (_, end) in zip(sample, spans, strict=True))
    return [(start + shift, end + shift) for start, end in spans]


def draw(samples: dict[str, Sample]) -> Figure:
    """A panel for each model, a lane for each part of the system, a colour for each step."""
    figure = Figure(figsize=(9, 2.6 * len(samples)))
    panels = figure.subplots(len(samples), 1, squeeze=False)
    for panel, (title, sample) in zip(panels[:, 0], samples.items(), strict=True):
        _draw_lanes(panel, sample)
        panel.set_title(f"{title}: decode steps of {BATCH} rows, {DEPTH} plans in flight", fontsize=9)
        panel.set_yticks(range(len(LANES)), LANES, fontsize=8)
        panel.invert_yaxis()
        panel.tick_params(axis="x", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        names = [", ".join(map(str, numbers)) for numbers in steps_by_colour(len(sample))]
        patches = [Patch(color=colour, label=f"steps {n}") for n, colour in zip(names, STEP_COLOURS, strict=False)]
        patches.append(Patch(color="black", alpha=PREPARING_ALPHA, label="pale: prepares"))
        panel.legend(handles=patches, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1, 0].set_xlabel("microseconds", fontsize=8)
    figure.tight_layout()
    return figure


def steps_by_colour(num_steps: int) -> list[list[int]]:
    """The numbers of the steps, from 1, that are drawn in each colour."""
    return [list(range(1 + index, num_steps + 1, len(STEP_COLOURS))) for index in range(len(STEP_COLOURS))]


def _draw_lanes(panel: Axes, sample: Sample) -> None:
    colours = [STEP_COLOURS[i % len(STEP_COLOURS)] for i in range(len(sample))]
    wire, launcher, gpu, completer = range(len(LANES))

    def bar(lane: int, start: float, end: float, colour: str, alpha: float = 1.0) -> None:
        # An outline keeps the host's short bars visible; the GPU's would hide gaps.
        width = 0 if lane == gpu else 0.5
        panel.barh(lane, end - start, LANE_HEIGHT, start, color=colour, alpha=alpha, edgecolor=colour, linewidth=width)

    for number, (step, (start, end), colour) in enumerate(zip(sample, gpu_spans(sample), colours, strict=True), 1):
        bar(launcher, step["begun_us"], step["prepared_us"], colour, PREPARING_ALPHA)
        bar(launcher, step["prepared_us"], step["queued_us"], colour)
        bar(gpu, start, end, colour)
        panel.text((start + end) / 2, gpu, f"step {number}", ha="center", va="center", fontsize=7, color="white")
        bar(completer, end, step["sent_us"], colour)
    for step, later, colour in zip(sample, sample[DEPTH:], colours[DEPTH:], strict=False):
        bar(wire, step["sent_us"], later["received_us"], colour)
