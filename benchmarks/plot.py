"""Draws docs/images: throughput.svg and roofline.svg from the results of benchmarks.throughput, scaling.svg from
benchmarks.scaling's, timeline.svg from those of benchmarks.gaps (see benchmarks/timeline.py).

Usage: python -m benchmarks.plot [RESULTS_DIR [IMAGES_DIR]]

Takes the runs that have anchors (benchmarks/anchors.py), the newest of each shape, sampling and number of GPUs; says
which it skips. The same results give the same bytes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks import timeline
from benchmarks.anchors import FLOOR, NANO_VLLM, VLLM, anchors_of, num_ranks
from benchmarks.common import REPOSITORY, RESULTS, Report, newest, read_reports
from benchmarks.throughput import speed_ratio

TANDEM = "Tandem"
COLOURS = {TANDEM: "#d1495b", VLLM: "#30638e", NANO_VLLM: "#9aa5b1"}
SAMPLING_TEXTS = {"temperature": "temperature 0.6", "qwen3": "temperature 0.6, top-k 20, top-p 0.95"}

Key = tuple[str, str, int]
"""Shape, sampling, number of GPUs."""
Numbers = dict[str, dict[str, float]]
"""For each row, the measured value of each engine, and the floor."""


def load_results(folder: Path) -> dict[Key, Numbers]:
    """The measured values beside their anchors."""
    comparable: list[tuple[Key, Report]] = []
    for name, report in read_reports(folder, "throughput_*.json"):
        if anchors_of(report):
            comparable.append(((report["shape"], report["sampling"], num_ranks(report)), report))
        else:
            print(f"{name}: nothing to compare it with; skipped")
    by_key = newest(comparable)
    return {
        key: {
            name: {TANDEM: report["rows"][name]["median"], **others}
            for name, others in anchors_of(report).items()
            if name in report["rows"]
        }
        for key, report in sorted(by_key.items(), key=lambda item: (item[0][0], item[0][2], -len(anchors_of(item[1]))))
    }


def draw(
    results: dict[Key, Numbers],
    engines: tuple[str, ...],
    reference: str,
    label: Callable[[float, float], str],
    axis: str,
    path: Path,
) -> None:
    """A panel for each model, a group of bars for each row that the reference has: speeds relative to the reference."""
    results = {key: {name: row for name, row in rows.items() if reference in row} for key, rows in results.items()}
    results = {key: rows for key, rows in results.items() if rows}
    figure, panels = pyplot.subplots(len(results), 1, figsize=(9, 3.1 * len(results)), squeeze=False)
    for panel, ((shape, sampling, count), rows) in zip(panels[:, 0], results.items(), strict=True):
        present = [engine for engine in engines if any(engine in row for row in rows.values())]
        width = 0.8 / len(present)
        for index, engine in enumerate(present):
            there = [(x, name) for x, name in enumerate(rows) if engine in rows[name]]
            ratios = [speed_ratio(name, rows[name][engine], rows[name][reference]) for _, name in there]
            at = [x + (index - (len(present) - 1) / 2) * width for x, _ in there]
            bars = panel.bar(at, ratios, width, label=engine, color=COLOURS[engine])
            texts = [label(rows[name][engine], ratio) for (_, name), ratio in zip(there, ratios, strict=True)]
            panel.bar_label(bars, texts, fontsize=6.5, padding=1)
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set_xticks(range(len(rows)), rows, fontsize=8)
        panel.set_ylabel(axis, fontsize=8)
        gpus = "one H100" if count == 1 else f"{count} H100s"
        panel.set_title(f"Qwen3-{shape.upper()} shape, {gpus}, {SAMPLING_TEXTS[sampling]}", fontsize=9)
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8, frameon=False, ncols=len(engines))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path}")


def main(results_folder: Path, images: Path) -> None:
    # Without a salt the ids in the file would be random.
    matplotlib.rcParams["svg.hashsalt"] = "tandem"
    if results := load_results(results_folder):
        draw_speeds(results, images)
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


def draw_speeds(results: dict[Key, Numbers], images: Path) -> None:
    draw(
        results,
        (NANO_VLLM, VLLM, TANDEM),
        VLLM,
        lambda value, ratio: f"{value:,.0f}" if value >= 1000 else f"{value:.2f}",
        "speed, vLLM = 1 (s, ms, tok/s on the bars)",
        images / "throughput.svg",
    )
    draw(
        results,
        (VLLM, TANDEM),
        FLOOR,
        lambda value, ratio: f"{ratio:.0%}",
        "share of the hardware's floor",
        images / "roofline.svg",
    )


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
        panel.plot(sorted(sizes), [size / min(sizes) for size in sorted(sizes)], color="#9aa5b1", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
        panel.set_xlabel("ranks", fontsize=8)
        panel.set_ylabel(f"speed, {min(sizes)} rank = 1; hollow: predicted; grey: ideal", fontsize=8)
        panel.set_title(f"{scaling['name']} on {scaling['device']}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS,
        Path(sys.argv[2]) if len(sys.argv) > 2 else REPOSITORY / "docs" / "images",
    )
