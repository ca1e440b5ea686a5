"""The benchmarks' own arithmetic, and a run of the table and of the load generator at a small scale."""

import asyncio
import hashlib
import importlib.util
import itertools
import json
import math
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plot, serve, throughput
from benchmarks.anchors import ANCHORS, FLOOR, NANO_VLLM, VLLM
from benchmarks.checkpoint import COMMON, SIZES, write_checkpoint
from benchmarks.common import SAMPLINGS, BenchmarkError, check_usage, request_fields, setting, shape_of
from benchmarks.latency import LoadSample, Stream, saturated_part, step_seconds, summarize
from benchmarks.stream_clients import Arrival, parse
from benchmarks.throughput import TTFT_RUNS, Bench, decode_ms, prefill_rate, ttft_ms
from benchmarks.workloads import Workload, fixed, nano256, shortened
from tandem.latency import percentiles
from tandem.v1 import inference_pb2
from tandem_shared.model_folder import EMBEDDED_MODEL, TOKENIZER_FILES, resolve_model

# Folders that may hold the workloads on which the anchors were timed.
ORIGINAL = Path(__file__).resolve().parents[4] / "shared" / "bench" / "workloads.py"
H100 = "NVIDIA H100 80GB HBM3"


def digest(workload: Workload) -> str:
    return hashlib.sha256(json.dumps(workload).encode()).hexdigest()[:16]


def test_workloads_are_those_of_the_anchors() -> None:
    assert sum(nano256()[1]) == 133_966
    assert digest(nano256()) == "199c6f016a1bff73"
    assert digest(nano256(5)) == "ba3f91f2ec590766"
    assert digest(fixed(64, 2048, 1)) == "fb2e181417a77172"
    assert digest(fixed(3, 512, 257, 7)) == "35e13c9f7b103e16"


@pytest.mark.skipif(not ORIGINAL.exists(), reason="the original is not here")
def test_workloads_equal_the_original() -> None:
    spec = importlib.util.spec_from_file_location("original_workloads", ORIGINAL)
    assert spec is not None and spec.loader is not None
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    assert nano256() == original.nano256()
    assert nano256(7) == original.nano256(7)
    assert fixed(9, 100, 5, 3) == original.fixed(9, 100, 5, 3)


def test_a_small_vocabulary_changes_no_length() -> None:
    prompts, outputs = nano256(8, vocab_size=100)
    whole_prompts, whole_outputs = nano256(8)
    assert outputs == whole_outputs
    assert [len(prompt) for prompt in prompts] == [len(prompt) for prompt in whole_prompts]
    assert max(max(prompt) for prompt in prompts) < 100


def test_shortened() -> None:
    assert shortened(([[1, 2, 3, 4], [5], [6], [7]], [8, 1, 4, 4]), 2) == ([[1, 2], [5]], [4, 1])
    assert shortened(nano256(4), 1) == nano256(4)


class FakeSeconds:
    """A server whose time is a constant, plus a time for each prompt token, plus a time for each step."""

    def __init__(self, prompt_token_s: float, step_s: float) -> None:
        self._prompt_token_s, self._step_s = prompt_token_s, step_s
        self.prompts: list[tuple[int, ...]] = []
        self.num_calls = 0

    async def __call__(self, workload: Workload) -> float:
        prompts, outputs = workload
        self.num_calls += 1
        self.prompts += map(tuple, prompts)
        return 0.5 + self._prompt_token_s * sum(map(len, prompts)) + self._step_s * (max(outputs) - 1)


def run(measure: Callable[[Bench, int], Awaitable[float]], seconds: Any, repeat: int = 0, scale: int = 1) -> float:
    async def call() -> float:
        return await measure(Bench(seconds, 10_001, scale), repeat)

    return asyncio.run(call())


@pytest.mark.parametrize("scale", [1, 16])
@pytest.mark.parametrize("row", ["decode_b1", "decode_b64"])
def test_a_decode_row_is_the_time_of_a_step_alone(row: str, scale: int) -> None:
    seconds = FakeSeconds(prompt_token_s=1e-5, step_s=0.007)
    assert run(throughput.ROWS[row][1], seconds, scale=scale) == pytest.approx(7.0)


def test_no_prompt_of_a_row_comes_twice() -> None:
    seconds = FakeSeconds(1e-5, 0.007)
    for repeat in range(3):
        run(lambda bench, repeat: decode_ms(bench, repeat, num_seqs=4), seconds, repeat)
    assert len(set(seconds.prompts)) == len(seconds.prompts) == 3 * 2 * 4
    seconds = FakeSeconds(1e-5, 0.007)
    for repeat in range(3):
        run(ttft_ms, seconds, repeat)
    assert len(set(seconds.prompts)) == len(seconds.prompts) == 3 * TTFT_RUNS


def test_a_ttft_row_is_a_median() -> None:
    times = iter([0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 50.0])

    async def seconds(workload: Workload) -> float:
        assert [len(prompt) for prompt in workload[0]] == [1024] and workload[1] == [1]
        return next(times)

    assert run(ttft_ms, seconds) == pytest.approx(450.0)


def test_the_prefill_row_is_prompt_tokens_a_second() -> None:
    seconds = FakeSeconds(prompt_token_s=1e-5, step_s=1.0)
    assert run(prefill_rate, seconds) == pytest.approx(64 * 2048 / (0.5 + 64 * 2048 * 1e-5))


def test_replies_that_are_not_what_was_asked_for_are_refused() -> None:
    check_usage(inference_pb2.Usage(num_output_tokens=3), 3, 3)
    for usage, num_tokens in (
        (inference_pb2.Usage(num_output_tokens=3, num_cached_tokens=16), 3),
        (inference_pb2.Usage(num_output_tokens=3), 2),
        (inference_pb2.Usage(num_output_tokens=2), 2),
    ):
        with pytest.raises(BenchmarkError):
            check_usage(usage, num_tokens, 3)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_requests_leave_no_sampling_to_the_model_and_share_a_new_salt(sampling: str) -> None:
    batches = [request_fields(([[1, 2], [3]], [5, 6]), sampling) for _ in range(2)]
    requests = [inference_pb2.GenerateRequest(**fields) for batch in batches for fields in batch]
    for request in requests:
        for field in ("temperature", "top_k", "top_p", "min_p", "seed"):
            assert request.sampling.HasField(field)
        assert request.stopping.ignore_eos
    assert [request.stopping.max_tokens for request in requests] == [5, 6, 5, 6]
    assert requests[0].cache_salt == requests[1].cache_salt != requests[2].cache_salt


def test_settings_have_their_types() -> None:
    assert [setting(text) for text in ("max_num_seqs=8", "enforce_eager=true", "device=cpu", "tokenizer=a=b")] == [
        ("max_num_seqs", 8),
        ("enforce_eager", True),
        ("device", "cpu"),
        ("tokenizer", "a=b"),
    ]


def random_streams(rng: np.random.Generator, count: int) -> list[Stream]:
    streams = []
    for _ in range(count):
        scheduled = float(rng.uniform(10, 12))
        num_messages = int(rng.integers(1, 40))
        arrivals = scheduled + np.cumsum(rng.exponential(0.02, num_messages))
        num_tokens = rng.integers(1, 4, num_messages)
        streams.append(Stream(scheduled, scheduled + 0.001, arrivals, num_tokens, float(arrivals[-1])))
    return streams


def test_a_summary_equals_brute_force() -> None:
    streams = random_streams(np.random.default_rng(0), 50)
    slo_ttft_s, slo_tpot_s = 0.02, 0.012
    report = summarize(streams, [], 10.0, slo_ttft_s, slo_tpot_s)
    elapsed = max(stream.ended for stream in streams) - 10.0
    gaps, firsts, good = [], [], 0
    for stream in streams:
        times, counts = stream.arrivals.tolist(), stream.num_tokens.tolist()
        gaps += [1e3 * (after - before) for before, after in itertools.pairwise(times)]
        firsts.append(1e3 * (times[0] - stream.scheduled))
        later = sum(counts) - counts[0]
        tpot = (times[-1] - times[0]) / later if later else 0.0
        good += firsts[-1] <= 1e3 * slo_ttft_s and tpot <= slo_tpot_s
    total = sum(sum(stream.num_tokens.tolist()) for stream in streams)
    assert 0 < good < 50
    assert report["goodput"]["share"] == good / 50
    assert report["goodput"]["requests_s"] == pytest.approx(good / elapsed, abs=1e-3)
    assert report["output_tok_s"] == pytest.approx(total / elapsed, abs=0.1)
    for name, values in (("itl_ms", gaps), ("ttft_ms", firsts)):
        for q in (50, 90, 99):
            assert report[name][f"p{q}"] == pytest.approx(np.percentile(values, q), abs=1e-3)
    assert report["lateness_ms"]["p99"] == pytest.approx(1.0)
    shares = report["tokens_per_message"]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert sum(int(size) * share for size, share in shares.items()) == pytest.approx(
        report["tokens_per_message"]["mean"], abs=1e-3
    )


def test_percentiles_interpolate_and_take_nothing() -> None:
    assert percentiles([1.0, 2.0]) == {"p50": 1.5, "p90": 1.9, "p99": 1.99}
    assert percentiles([]) == {}


def test_steps_are_timed_where_the_batch_is_full() -> None:
    running = [0, 4, 10, 9, 5, 10, 9, 2]
    steps = [0, 1, 11, 21, 31, 41, 61, 261]
    samples = [
        LoadSample(float(i), num_steps, count) for i, (num_steps, count) in enumerate(zip(steps, running, strict=True))
    ]
    part = saturated_part(samples)
    assert [sample.time for sample in part] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert step_seconds(part) == pytest.approx(0.1)
    assert step_seconds(part[:1]) is None
    assert saturated_part([]) == [] and saturated_part(samples[:1]) == []
    # Gaps of 0.2 s inside, and one after, which does not count.
    stream = Stream(2.0, 2.0, np.array([2.0, 2.2, 2.4, 2.6, 99.0]), np.ones(5, int), 99.0)
    saturated = summarize([stream], samples, 0.0, 1, 1)["saturated"]
    assert saturated["step_ms"] == 100.0 and saturated["itl_steps"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}


def test_arrivals_are_poisson_and_seeded() -> None:
    times = serve.arrival_times(20_000, 50.0, seed=3)
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03) and gaps.std() == pytest.approx(1 / 50, rel=0.05)
    assert times == serve.arrival_times(20_000, 50.0, seed=3) != serve.arrival_times(20_000, 50.0, seed=4)
    assert serve.arrival_times(3, math.inf, seed=3) == [0.0, 0.0, 0.0]


def test_messages_without_tokens_are_no_arrivals() -> None:
    messages = [
        inference_pb2.GenerateStreamResponse(token_ids=[1]),
        inference_pb2.GenerateStreamResponse(token_ids=[2, 3]),
        inference_pb2.GenerateStreamResponse(usage=inference_pb2.Usage(num_output_tokens=3)),
    ]
    stream = parse(Arrival(b"", 3, 0.5), 10.0, 10.6, [11.0, 12.0, 13.0], [m.SerializeToString() for m in messages])
    assert (stream.scheduled, stream.sent, stream.ended) == (10.5, 10.6, 13.0)
    assert stream.arrivals.tolist() == [11.0, 12.0] and stream.num_tokens.tolist() == [1, 2]
    assert stream.ttft == 0.5 and stream.tpot == 0.5


def full_report(shape: str, sampling: str, factor: float, tp_size: int = 1, **changes: Any) -> dict[str, Any]:
    anchors = ANCHORS[shape, sampling, tp_size]
    rows = {name: {"median": factor * row.get(VLLM, 1.0), "unit": "ms"} for name, row in anchors.items()}
    head = {"shape": shape, "sampling": sampling, "scale": 1, "device": H100, "date": "2026-01-01", "rows": rows}
    return head | {"settings": {} if tp_size == 1 else {"tp_size": tp_size}} | changes


def test_plots_take_the_newest_comparable_results_and_are_deterministic(tmp_path: Path) -> None:
    reports = {
        "throughput_a": full_report("0.6b", "temperature", 0.5, date="2026-01-02"),
        "throughput_b": full_report("0.6b", "temperature", 0.9),
        "throughput_c": full_report("0.6b", "qwen3", 0.5),
        "throughput_d": full_report("8b", "temperature", 0.5, device="another"),
        "throughput_e": full_report("8b", "temperature", 0.5, scale=2),
        "throughput_f": full_report("8b", "temperature", 0.5, tp_size=2),
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    results = plot.numbers_in(plot.load_reports(tmp_path))
    assert list(results) == [("0.6b", "temperature", 1), ("0.6b", "qwen3", 1), ("8b", "temperature", 2)]
    row = results["0.6b", "temperature", 1]["nano256"]
    assert row[plot.TANDEM] == 0.5 * row[VLLM] and row[FLOOR] == 5.21
    assert results["8b", "temperature", 2]["nano256"] == {plot.TANDEM: 5.47, VLLM: 10.94, NANO_VLLM: 14.76}
    for images in ("one", "two"):
        plot.main(tmp_path, tmp_path / images)
    for name in ("throughput.svg", "roofline.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_speed_ratio_knows_which_way_is_better() -> None:
    assert throughput.speed_ratio("nano256", 5.0, 10.0) == 2.0
    assert throughput.speed_ratio("prefill_64x2048", 5.0, 10.0) == 0.5


@pytest.mark.parametrize("size", ["0.6b", "8b", "32b"])
def test_a_shape_is_known_by_its_size(size: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | SIZES[size]))
    assert shape_of(str(tmp_path)) == size


def common_flags(scale: int) -> list[str]:
    return ["--scale", str(scale), "--connections", "2", "--set", "num_threads=1", "--commit", "abc"]


def test_the_table_runs_on_a_made_checkpoint(tmp_path: Path) -> None:
    model, out = tmp_path / "tiny", tmp_path / "out.json"
    write_checkpoint("tiny", model, resolve_model(EMBEDDED_MODEL, TOKENIZER_FILES) / "tokenizer.json")
    throughput.main([str(model), *common_flags(32), "--repeats", "2", "--set", "api_server_count=0", "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["commit"], report["device"], report["model"], report["shape"]) == ("abc", "cpu", "tiny", None)
    assert report["settings"] == {"num_threads": 1, "api_server_count": 0} and report["startup_s"] > 0
    assert report["versions"]["torch"] and report["versions"]["grpcio"]
    assert list(report["rows"]) == list(throughput.ROWS)
    for name, row in report["rows"].items():
        assert row["unit"] == throughput.ROWS[name][0] and len(row["repeats"]) == 2
        assert row["median"] == pytest.approx(statistics.median(row["repeats"]), abs=1e-3)
        assert row["load"]["num_steps"] > 0 and row["load"]["num_cached_prompt_tokens"] == 0
    nano = report["rows"]["nano256"]
    assert nano["output_tok_s"] == pytest.approx(sum(shortened(nano256(), 32)[1]) / nano["median"], rel=0.01)
    # One step for the prompt, one for each further token, in each of two repeats.
    assert report["rows"]["decode_b1"]["load"]["num_steps"] == 2 * (1 + 256 // 32 + 1)


@pytest.mark.slow
def test_the_load_generator_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    serve.main(["embedded", *common_flags(32), "--clients", "2", "--rates", "20", "inf", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [measured["rate"] for measured in report["rates"]] == ["20.0", "inf"]
    for measured in report["rates"]:
        assert measured["output_tok_s"] > 0 and measured["load"]["num_cached_prompt_tokens"] == 0
        assert measured["tokens_per_message"]["mean"] >= 1
        assert measured["ttft_ms"]["p50"] <= measured["e2e_ms"]["p50"]
        assert measured["requests_s"] * measured["elapsed_s"] == pytest.approx(8, rel=0.01)
