"""benchmarks.sampling_costs: what its cases ask for, its arithmetic, and a run on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import sampling_costs
from benchmarks.sampling_costs import FEW, IN_FEW, WARM_UP_STEPS, Case, Run, cases, compare, plain_rows, run_of
from tandem_shared.sampling_fields import fields_out_of_range
from tandem_shared.sampling_lists import adjusts_logits, problems

VOCAB_SIZE = 1024


@pytest.mark.parametrize("num_rows", [6, 64, 256])
def test_the_rows_of_a_case_ask_for_what_it_says(num_rows: int) -> None:
    names = [case.name for case in cases(num_rows)]
    assert len(set(names)) == len(names)
    assert {f"{asks}_{count}" for asks in IN_FEW for count in FEW if count < num_rows} < set(names)
    for case in cases(num_rows):
        rows, base = case.rows(VOCAB_SIZE), plain_rows(num_rows, VOCAB_SIZE)
        assert len(rows) == num_rows
        assert sum(row != plain for row, plain in zip(rows, base, strict=True)) == case.num_asking
        assert not any(fields_out_of_range(row.sampling) or [*problems(row.lists, VOCAB_SIZE)] for row in rows)
        adjusting = sum(adjusts_logits(row.sampling, row.lists) for row in rows)
        if case.asks in ("penalties", "grammar", "lists"):
            assert adjusting == case.num_asking
        elif case.asks == sampling_costs.MIXTURE:
            assert 0 < adjusting < case.num_asking
        else:
            assert adjusting == 0


def test_the_limits_are_those_of_few_rows_and_of_all() -> None:
    def limit(asks: str, num_asking: int, num_rows: int) -> float | None:
        return Case(asks, num_asking, num_rows).limit

    assert [limit("penalties", count, 64) for count in (1, 16, 64)] == [1.03, 1.03, 1.08]
    assert [limit("logprobs", count, count) for count in (64, 256)] == [1.08, None]
    assert limit("top_p", 256, 256) == 1.08 and limit("lists", 64, 64) is limit("mixture", 4, 64) is None


def test_a_run_is_the_mean_of_its_steps_without_the_first() -> None:
    warm_up = [float(second) for second in range(WARM_UP_STEPS)]
    times = [*warm_up, 100.0, 100.001, 100.004]
    assert run_of(times) == Run(pytest.approx(2.0), pytest.approx(3.0))


def test_a_case_and_the_plain_batch_take_turns() -> None:
    order = []
    # The machine gets slower all the time: each run takes longer than the one before, and the case twice as long.
    times = {"plain": iter([1.0, 1.4, 2.0]), "case": iter([2.2, 2.6, 4.4])}

    def run(kind: str) -> Run:
        order.append(kind)
        mean = next(times[kind])
        return Run(mean, 10 * mean)

    entry = compare(lambda: run("plain"), lambda: run("case"), 3)
    assert order == ["plain", "case", "case", "plain", "plain", "case"]
    assert entry == {
        "plain_ms": 1.4, "ms": 2.6, "ratio": 2.2, "ratios": [2.2, 1.8571, 2.2],
        "plain_longest_ms": 20.0, "longest_ms": 44.0,
    }  # fmt: skip


def test_the_table_has_a_column_for_how_many_rows_ask() -> None:
    fine, slow = {"ratio": 1.0, "limit": 1.03}, {"ratio": 1.0912, "limit": 1.08}
    report = {"batches": {"6": {"top_p_1": fine, "top_p_all": slow, "lists_all": slow | {"limit": None}}}}
    assert sampling_costs.table(report).splitlines() == [
        "| | 1 of 6 | 4 of 6 | 16 of 6 | all of 6 |",
        "|---|---|---|---|---|",
        "| top_p | 1.000 |  |  | 1.091 |",
        "| lists |  |  |  | 1.091 |",
    ]
    assert sampling_costs.exceeded(report) == ["top_p_all of 6 rows: 1.091, limit 1.08"]


def test_it_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    names = ["mixture_4", "lists_all", "top_k_and_p_all", "mixture_all"]
    few = ["--batches", "5", "--context", "20", "--steps", "1", "--pairs", "1", "--only", *names]
    sampling_costs.main(["embedded", *few, "--set", "num_threads=1", "--commit", "abc", "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["commit"], report["device"], report["steps"]) == ("abc", "cpu", 1)
    entries = report["batches"]["5"]
    assert list(entries) == names
    assert all(entry["ms"] > 0 and len(entry["ratios"]) == 1 for entry in entries.values())
    assert sampling_costs.table(report) in capsys.readouterr().out
