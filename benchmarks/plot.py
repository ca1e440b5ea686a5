"""Draws docs/images: throughput.svg and roofline.svg from the results of benchmarks.throughput, scaling.svg from
benchmarks.scaling's, timeline.svg from those of benchmarks.gaps (see benchmarks/timeline.py).

Usage: python -m benchmarks.plot [RESULTS_DIR [IMAGES_DIR]]

Takes the runs that have anchors (benchmarks/anchors.py), the newest of each shape, sampling and number of GPUs; says
which it skips. The same results give the same bytes.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks import timeline
from benchmarks.anchors import FLOOR, NANO_VLLM, VLLM, anchors_of, num_ranks
from benchmarks.common import REPOSITORY, RESULTS, Report, commit_in, newest, read_reports
from benchmarks.throughput import speed_ratio

TANDEM = "Tandem"
COLOURS = {TANDEM: "#d1495b", VLLM: "#30638e", NANO_VLLM: "#9aa5b1"}
ROW_TITLES = {
    "nano256": "256 requests\n(nano256)",
    "decode_b1": "a step of 1\n(decode_b1)",
    "decode_b64": "a step of 64\n(decode_b64)",
    "decode_b256": "a step of 256\n(decode_b256)",
    "ttft_1024": "first token\n(ttft_1024)",
    "prefill_64x2048": "prompts\n(prefill_64x2048)",
}
SAMPLING_TEXTS = {"temperature": "temperature 0.6", "qwen3": "temperature 0.6, top-k 20, top-p 0.95"}

Key = tuple[str, str, int]
"""Shape, sampling, number of GPUs."""
Numbers = dict[str, dict[str, float]]
"""For each row, the measured value of each engine, and the floor."""


def load_reports(folder: Path) -> dict[Key, Report]:
    """The reports that have anchors, in the order of the panels."""
    comparable: list[tuple[Key, Report]] = []
    for name, report in read_reports(folder, "throughput_*.json"):
        if anchors_of(report):
            comparable.append(((report["shape"], report["sampling"], num_ranks(report)), report))
        else:
            print(f"{name}: nothing to compare it with; skipped")
    by_key = newest(comparable)
    return dict(sorted(by_key.items(), key=lambda item: (item[0][0], item[0][2], -len(anchors_of(item[1])))))


def numbers_in(reports: dict[Key, Report]) -> dict[Key, Numbers]:
    """The measured values beside their anchors."""
    return {
        key: {
            name: {TANDEM: report["rows"][name]["median"], **others}
            for name, others in anchors_of(report).items()
            if name in report["rows"]
        }
        for key, report in reports.items()
    }


def draw(results: dict[Key, Numbers], commits: dict[Key, str], reference: str, line: str, path: Path) -> None:
    """A panel for each model, a group of bars for each row that the reference has: speeds relative to the reference, so
    up is faster in all rows. line: what the legend says of the line at the reference's speed.
    """
    results = {key: {name: row for name, row in rows.items() if reference in row} for key, rows in results.items()}
    results = {key: rows for key, rows in results.items() if rows}
    figure, panels = pyplot.subplots(len(results), 1, figsize=(9, 3.1 * len(results)), squeeze=False)
    for panel, (key, rows) in zip(panels[:, 0], results.items(), strict=True):
        present = [engine for engine in (NANO_VLLM, VLLM, TANDEM) if any(engine in row for row in rows.values())]
        width = 0.8 / len(present)
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--", label=line, zorder=0)
        for index, engine in enumerate(present):
            there = [(x, name) for x, name in enumerate(rows) if engine in rows[name]]
            ratios = [speed_ratio(name, rows[name][engine], rows[name][reference]) for _, name in there]
            at = [x + (index - (len(present) - 1) / 2) * width for x, _ in there]
            bars = panel.bar(at, ratios, width, label=engine, color=COLOURS[engine])
            # The box hides the line behind a number.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            panel.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], fontsize=7, padding=2, bbox=box)
        panel.set_xticks(range(len(rows)), [ROW_TITLES[name] for name in rows], fontsize=8)
        panel.set_ylabel("speed (higher is faster)", fontsize=8)
        shape, sampling, count = key
        gpus = "one H100" if count == 1 else f"{count} H100s"
        panel.set_title(
            f"Qwen3-{shape.upper()} shape, {gpus}, {SAMPLING_TEXTS[sampling]}{at_commit(commits[key])}", fontsize=9
        )
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        # Beside the bars, as no corner is free in all panels.
        panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def at_commit(commit: str) -> str:
    return f", Tandem at {commit}" if commit else ""


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}")


def main(results_folder: Path, images: Path) -> None:
    # Without a salt the ids in the file would be random.
    matplotlib.rcParams["svg.hashsalt"] = "tandem"
    if reports := load_reports(results_folder):
        commits = {key: commit_in(report) for key, report in reports.items()}
        draw_speeds(numbers_in(reports), commits, images)
    else:
        print(f"no results of benchmarks.throughput to draw in {results_folder}")
    scalings = results_folder / "scaling.json"
    if scalings.exists() and (measured := json.loads(scalings.read_text())["scalings"]):
        save(draw_scaling(measured), images / "scaling.svg")
    else:
        print(f"no results of benchmarks.scaling to draw in {results_folder}")
    if samples := timeline.load_samples(results_folder):
        save(timeline.draw(samples), images / "timeline.svg")
    else:
        print(f"no results of benchmarks.gaps to draw in {results_folder}")


def draw_speeds(results: dict[Key, Numbers], commits: dict[Key, str], images: Path) -> None:
    draw(results, commits, VLLM, f"{VLLM} = 1", images / "throughput.svg")
    draw(results, commits, FLOOR, "the hardware's limit = 1", images / "roofline.svg")


def draw_scaling(scalings: list[Report]) -> Figure:
    """A panel for each model: the speed of each row relative to that of the fewest ranks, measured and predicted
    (hollow).
    """
    figure, panels = pyplot.subplots(1, len(scalings), figsize=(7 * len(scalings), 5), squeeze=False)
    for panel, scaling in zip(panels[0], scalings, strict=True):
        sizes: set[int] = set()
        for index, (name, row) in enumerate(scaling["measured"].items()):
            base = row[min(row, key=int)]["median"]
            predicted = {size: numbers[name] for size, numbers in scaling["predicted"].items()}
            for numbers, style in ((predicted, "--"), ({size: entry["median"] for size, entry in row.items()}, "-")):
                ranks = sorted(map(int, numbers))
                speeds = [speed_ratio(name, numbers[str(size)], base) for size in ranks]
                face = "white" if style == "--" else f"C{index}"
                label = name if style == "-" else None
                panel.plot(ranks, speeds, style, color=f"C{index}", marker="o", markerfacecolor=face, label=label)
                sizes.update(ranks)
        ideal = [size / min(sizes) for size in sorted(sizes)]
        panel.plot(sorted(sizes), ideal, color="#9aa5b1", linewidth=0.8, label="ideal")
        commits = {size: commit_in(entry) for row in scaling["measured"].values() for size, entry in row.items()}
        measured = ", ".join(f"{size} at {commit}" for size, commit in commits.items() if commit)
        for face, style, label in (("black", "-", f"measured: {measured}"), ("white", "--", "predicted")):
            panel.plot([], [], style, color="black", marker="o", markerfacecolor=face, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
        panel.set_xlabel("GPUs, one rank on each", fontsize=8)
        panel.set_ylabel(f"speed (higher is faster), {min(sizes)} rank = 1", fontsize=8)
        panel.set_title(f"Qwen3-{scaling['name'].upper()} shape on {scaling['device']}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS,
        Path(sys.argv[2]) if len(sys.argv) > 2 else REPOSITORY / "docs" / "images",
    )
