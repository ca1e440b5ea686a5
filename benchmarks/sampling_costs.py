"""What it costs a step if rows ask more of sampling than a temperature: a runner's decode steps, without services.

Usage: python -m benchmarks.sampling_costs MODEL [--batches 64 256] [--only TEXT ...] [--profile] [--out OUT_JSON]

A case says how many rows of a batch ask for what. Its other rows have temperature 1 and nothing else, as all rows of
the plain batch do. In a run every row decodes, two plans in flight, from the same context, whose KV is random. A run's
time is the mean of its steps', by the host's clock. Case and plain batch run in pairs, one right after the other, and
the case's ratio is the median over the pairs.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import header, setting, shape_of, write_json
from benchmarks.step_driver import RowAsks, StepDriver
from benchmarks.workloads import SCHEMAS
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.options import split_keywords
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.structured_output import json_schema_grammar
from tandem_worker.startup import build_runner

NUM_ALLOWED, NUM_BIASED, NUM_BAD_WORDS, BAD_WORD_LEN = 4000, 100, 20, 3
FEW = (1, 4, 16)
"""How many rows ask for something in the cases in which few do."""
LIMIT_OF_FEW, LIMIT_OF_ALL = 1.03, 1.08
"""How many times the plain batch's step a step may take."""
WARM_UP_STEPS = 6
NUM_KERNELS = 12
"""How many kernels a profile reports."""

Rows = list[RowAsks]


def plain(row: int, vocab_size: int) -> RowAsks:
    return RowAsks(RowSampling(seed=row))


def penalties(row: int, vocab_size: int) -> RowAsks:
    sampling = RowSampling(seed=row, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1)
    return RowAsks(sampling)


def grammar(row: int, vocab_size: int) -> RowAsks:
    return RowAsks(RowSampling(seed=row), SamplingLists(grammar=ARRAY_GRAMMAR))


def logprobs(row: int, vocab_size: int) -> RowAsks:
    return RowAsks(RowSampling(seed=row, num_logprobs=5))


def top_p(row: int, vocab_size: int) -> RowAsks:
    return RowAsks(RowSampling(seed=row, top_p=0.95))


def top_k_and_p(row: int, vocab_size: int) -> RowAsks:
    return RowAsks(RowSampling(seed=row, top_k=20, top_p=0.95))


def lists(row: int, vocab_size: int) -> RowAsks:
    """Allowed tokens, biases and bad words."""
    rng = np.random.default_rng(row)

    def some(count: int) -> list[int]:
        return sorted(rng.choice(vocab_size, min(count, vocab_size // 2), replace=False).tolist())

    asked = SamplingLists(
        allowed_token_ids=tuple(some(NUM_ALLOWED)),
        logit_bias=tuple((token_id, 1.0) for token_id in some(NUM_BIASED)),
        bad_words=tuple(tuple(some(BAD_WORD_LEN)) for _ in range(NUM_BAD_WORDS)),
    )
    return RowAsks(RowSampling(seed=row), asked)


ARRAY_GRAMMAR = Grammar(json_schema_grammar(json.dumps(SCHEMAS["array"])), ignore_eos=True)
ASKED: dict[str, Callable[[int, int], RowAsks]] = {
    "penalties": penalties,
    "grammar": grammar,
    "logprobs": logprobs,
    "top_p": top_p,
    "lists": lists,
    "top_k_and_p": top_k_and_p,
}
"""What rows ask for, by name; each is given a row's number and the size of the vocabulary."""
IN_FEW = ("penalties", "grammar", "logprobs", "top_p")
MIXTURE = "mixture"
"""A case whose asking rows ask for each of IN_FEW in turn."""
LIMITED_IN_ALL = {"penalties": 256, "top_p": 256, "logprobs": 64}
"""Up to which batch size all rows may ask for this, and a step still keeps to LIMIT_OF_ALL."""


@dataclass(frozen=True)
class Case:
    """num_asking rows of a batch of num_rows ask for something."""

    asks: str
    num_asking: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"{self.asks}_{'all' if self.num_asking == self.num_rows else self.num_asking}"

    @property
    def limit(self) -> float | None:
        """The ratio that is not to be exceeded, if any."""
        if self.num_asking < self.num_rows:
            return None if self.asks == MIXTURE else LIMIT_OF_FEW
        return LIMIT_OF_ALL if self.num_rows <= LIMITED_IN_ALL.get(self.asks, 0) else None

    def rows(self, vocab_size: int) -> Rows:
        """The batch. The rows that ask are spread over it evenly."""
        every = self.num_rows // self.num_asking
        asking = range(0, every * self.num_asking, every)
        names = IN_FEW if self.asks == MIXTURE else (self.asks,)
        rows = plain_rows(self.num_rows, vocab_size)
        for index, row in enumerate(asking):
            rows[row] = ASKED[names[index % len(names)]](row, vocab_size)
        return rows


def plain_rows(num_rows: int, vocab_size: int) -> Rows:
    return [plain(row, vocab_size) for row in range(num_rows)]


def cases(num_rows: int) -> Iterator[Case]:
    """The cases of a batch size."""
    few = [count for count in FEW if count < num_rows]
    yield from (Case(asks, count, num_rows) for asks in IN_FEW for count in few)
    yield from (Case(MIXTURE, count, num_rows) for count in few if count >= len(IN_FEW))
    yield from (Case(asks, num_rows, num_rows) for asks in (*ASKED, MIXTURE))


@dataclass(frozen=True)
class Run:
    """Milliseconds of a run's steps."""

    mean: float
    longest: float


def run_of(times: list[float]) -> Run:
    """times: when the results of a run's steps were there, in seconds. The first WARM_UP_STEPS are left out."""
    intervals = np.diff(times[WARM_UP_STEPS:]) * 1e3
    return Run(float(intervals.mean()), float(intervals.max()))


def compare(run_plain: Callable[[], Run], run_case: Callable[[], Run], num_pairs: int) -> dict[str, Any]:
    """Runs both num_pairs times, in turn. Every other pair begins with the case, so that a drift favours neither."""
    plain_runs, case_runs = [], []
    for pair in range(num_pairs):
        for is_case in (False, True) if pair % 2 == 0 else (True, False):
            (case_runs if is_case else plain_runs).append(run_case() if is_case else run_plain())
    ratios = [case.mean / plain.mean for plain, case in zip(plain_runs, case_runs, strict=True)]
    return {
        "plain_ms": round(statistics.median(run.mean for run in plain_runs), 4),
        "ms": round(statistics.median(run.mean for run in case_runs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "plain_longest_ms": round(max(run.longest for run in plain_runs), 3),
        "longest_ms": round(max(run.longest for run in case_runs), 3),
    }


class Measurement:
    """Measures cases on a runner."""

    def __init__(self, driver: StepDriver, context: int, num_steps: int, num_pairs: int) -> None:
        self._driver = driver
        self._context, self._num_steps, self._num_pairs = context, num_steps, num_pairs

    def measure(self, case: Case) -> dict[str, Any]:
        """The case's entry of the report."""
        vocab_size = self._driver.runner.info.vocab_size
        base, rows = plain_rows(case.num_rows, vocab_size), case.rows(vocab_size)
        # Kernels that only such rows need may be compiled at their first use.
        self.run(rows)
        gc.collect()
        entry = compare(lambda: self.run(base), lambda: self.run(rows), self._num_pairs)
        return entry | {"limit": case.limit}

    def run(self, rows: Rows) -> Run:
        self._driver.start_decoding(rows, self._context, WARM_UP_STEPS + 1 + self._num_steps)
        return run_of(self._driver.times_of_results(WARM_UP_STEPS + 1 + self._num_steps))

    def profile(self, case: Case) -> list[dict[str, Any]]:
        """The kernels of a step on the GPU, those first that take the most time beyond their time in a plain step."""
        from benchmarks.step_times import kernels_of

        vocab_size = self._driver.runner.info.vocab_size
        times: list[dict[str, float]] = []
        for rows in (plain_rows(case.num_rows, vocab_size), case.rows(vocab_size)):
            self._driver.start_decoding(rows, self._context, 2 * WARM_UP_STEPS)
            self._driver.times_of_results(WARM_UP_STEPS)
            kernels = kernels_of(lambda: self._driver.step().wait(), WARM_UP_STEPS // 2)
            times.append({name: us for name, _, us in kernels})
        added = {name: times[1].get(name, 0.0) - times[0].get(name, 0.0) for name in times[0] | times[1]}
        longest = sorted(added.items(), key=lambda entry: -abs(entry[1]))[:NUM_KERNELS]
        return [{"name": name, "added_us": round(us, 1)} for name, us in longest]


def table(report: dict[str, Any]) -> str:
    """The cases' ratios as Markdown: a line for what rows ask, a column for how many of a batch do."""
    places = [(num_rows, count) for num_rows in report["batches"] for count in (*map(str, FEW), "all")]
    titles = [f"{count} of {num_rows}" for num_rows, count in places]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(places)]
    for asks in (*ASKED, MIXTURE):
        entries = [report["batches"][num_rows].get(f"{asks}_{count}") for num_rows, count in places]
        if any(entries):
            texts = [f"{entry['ratio']:.3f}" if entry else "" for entry in entries]
            lines.append(f"| {asks} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def exceeded(report: dict[str, Any]) -> list[str]:
    """The cases that exceed their limits."""
    return [
        f"{name} of {num_rows} rows: {entry['ratio']:.3f}, limit {entry['limit']}"
        for num_rows, by_case in report["batches"].items()
        for name, entry in by_case.items()
        if entry["limit"] is not None and entry["ratio"] > entry["limit"]
    ]


def build(arguments: argparse.Namespace) -> StepDriver:
    """Loads the model, and fills its KV pool with random numbers."""
    num_tokens = arguments.context + arguments.steps + 2 * WARM_UP_STEPS
    given = {"model": arguments.model, "max_num_seqs": max(arguments.batches), **dict(arguments.set)}
    settings, _ = split_keywords(given, WorkerSettings, SchedulerSettings)
    if settings.num_blocks is None:
        num_blocks = max(arguments.batches) * -(-num_tokens // settings.block_size) + 1
        settings, _ = split_keywords({**given, "num_blocks": num_blocks}, WorkerSettings, SchedulerSettings)
    runner: Any = build_runner(settings)
    with torch.inference_mode():
        runner.cache.normal_()
    return StepDriver(runner)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or 'embedded'")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a setting")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="rows of the batch")
    parser.add_argument("--context", type=int, default=640, help="tokens of each row before the first step")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run that are timed")
    parser.add_argument("--pairs", type=int, default=5, help="how often a case and the plain batch run")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="only cases with one of these in the name"
    )
    parser.add_argument("--profile", action="store_true", help="with the kernels that a case adds, on a GPU")
    parser.add_argument("--commit", help="the commit that is measured; git is asked by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(command_line)
    driver = build(arguments)
    measurement = Measurement(driver, arguments.context, arguments.steps, arguments.pairs)
    info = driver.runner.info
    report = header("decode steps in which rows ask more of sampling", arguments.commit)
    report |= {"device": info.device, "model": info.model, "shape": shape_of(arguments.model), "dtype": info.dtype}
    report |= {name: getattr(arguments, name) for name in ("context", "steps", "pairs")}
    report |= {"settings": dict(arguments.set), "batches": {}}
    for num_rows in arguments.batches:
        entries = report["batches"][str(num_rows)] = {}
        for case in cases(num_rows):
            if any(text in case.name for text in arguments.only):
                entry = entries[case.name] = measurement.measure(case)
                print(f"{num_rows:4d} rows, {case.name}: {entry}", flush=True)
                if arguments.profile:
                    entry["kernels"] = measurement.profile(case)
                    print(
                        "\n".join(
                            f"    {kernel['added_us']:9.1f} us {kernel['name'][:90]}" for kernel in entry["kernels"]
                        )
                    )
                if arguments.out:
                    write_json(arguments.out, report)
    print(table(report))
    print("limits exceeded by:", "; ".join(exceeded(report)) or "none")


if __name__ == "__main__":
    main()
