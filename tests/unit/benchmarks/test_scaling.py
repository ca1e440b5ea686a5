"""What the scaling report says of results, its model against arithmetic by hand, and a run over ranks on CPUs."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling_model import DECODE_ROWS, ScalingModel

HIDDEN_SIZE = 4096


def kernels(**us: float) -> list[dict[str, Any]]:
    return [{"name": name.replace("__", " "), "calls": 1.0, "us": time} for name, time in us.items()]


def make_model() -> ScalingModel:
    """Decode steps of 1000 us of products, 100 of norms and 50 of sums, of which 50 overlap; prefill of 100 ms, where
    copies take 30 ms beside the rest.
    """
    decode = {"gpu_ms": 1.1, "kernels": kernels(gemm=1000.0, _rms_norm=100.0, _one_shot=50.0)}
    prefill = {"gpu_ms": 100.0, "kernels": kernels(gemm=96e3, _rms_norm=4e3, Memcpy__PtoP=20e3, _wait_for_all=10e3)}
    steps = {f"decode_temperature_{rows}": decode for rows in DECODE_ROWS}
    steps |= {"prefill_4x2048": prefill, "prefill_16x512": prefill}
    messages = {
        4096: {"one_shot_us": 2.0},
        2 * HIDDEN_SIZE: {"one_shot_us": 2.5, "copies_us": 32.0},
        512 * HIDDEN_SIZE: {"one_shot_us": 10.0, "copies_us": 40.0},
    }
    return ScalingModel(
        {"tp_size": 2, **steps}, {"by_message_bytes": {str(k): v for k, v in messages.items()}}, HIDDEN_SIZE
    )


def test_two_ranks_are_predicted_as_they_were_profiled() -> None:
    rows = make_model().rows(2)
    assert [rows[name] for name in ("decode_b1", "decode_b64", "decode_b256")] == pytest.approx([1.1] * 3)
    assert rows["prefill_64x2048"] == pytest.approx(8192 / 0.1)


def test_one_rank_has_all_the_work_and_no_sums() -> None:
    rows = make_model().rows(1)
    assert rows["decode_b64"] == pytest.approx((2000 + 100) * 1.1 / 1.15 / 1e3)
    assert rows["prefill_64x2048"] == pytest.approx(8192 / (2 * 0.096 + 0.004))


def test_sums_take_longer_the_more_ranks() -> None:
    scale = 1.1 / 1.15 / 1e3
    # At 1 row 0.5 us of 2.5 us grow with the number of other ranks. At 256 rows 2 us of 10 us come twice, in a sum of
    # two shots.
    rows = make_model().rows(4)
    assert rows["decode_b1"] == pytest.approx((500 + 100 + 50 * (2 + 3 * 0.5) / 2.5) * scale)
    assert rows["decode_b256"] == pytest.approx((500 + 100 + 50 * (2 * 2 + 1.5 * 8) / 10) * scale)
    assert rows["prefill_64x2048"] == pytest.approx(8192 / (0.096 / 2 + 0.004))
    # Over eight ranks, copies take longer than the work beside them.
    rows = make_model().rows(8)
    assert rows["decode_b256"] == pytest.approx((250 + 100 + 50 * (2 * 2 + 1.75 * 8) / 10) * scale)
    assert rows["prefill_64x2048"] == pytest.approx(8192 / (0.030 * 1.75 + 0.004))


def run_of(tp_size: int | None, median: float, rate: float, **changes: Any) -> dict[str, Any]:
    return {
        "date": "2026-01-01", "commit": "abc", "device": "cpu", "model": "m", "shape": None, "scale": 1,
        "sampling": "temperature", "settings": {} if tp_size is None else {"tp_size": tp_size},
        "rows": {"nano256": {"median": median}, "prefill_64x2048": {"median": rate}}, **changes,
    }  # fmt: skip


def test_efficiency_is_speed_over_the_smallest_and_over_the_ranks(tmp_path: Path) -> None:
    runs = {
        "a": run_of(None, 8.0, 100.0),
        "b": run_of(2, 99.0, 1.0),
        "c": run_of(2, 5.0, 150.0, date="2026-01-02"),
        "d": run_of(4, 4.0, 200.0),
        "alone": run_of(4, 1.0, 1.0, device="another"),
    }
    for name, run in runs.items():
        (tmp_path / f"throughput_{name}.json").write_text(json.dumps(run))
    (report,) = scaling.report(tmp_path)
    efficiency = {
        row: [entry["efficiency"] for entry in by_size.values()] for row, by_size in report["measured"].items()
    }
    assert efficiency == {"nano256": [1.0, 0.8, 0.5], "prefill_64x2048": [1.0, 0.75, 0.5]}
    assert list(report["measured"]["nano256"]) == ["1", "2", "4"]
    assert (report["sum_share"], report["predicted"]) == ({}, {})
    assert "5 80%" in scaling.table(report)


@pytest.mark.slow
def test_it_runs_over_eight_ranks(tmp_path: Path) -> None:
    flags = ["--scale", "64", "--repeats", "1", "--connections", "2", "--commit", "abc"]
    settings = [
        part for setting in ("num_threads=1", "api_server_count=0", "device=cpu") for part in ("--set", setting)
    ]
    scaling.main(["embedded", "--tp-sizes", "1", "4", "8", "--results", str(tmp_path), *flags, *settings])
    written = json.loads((tmp_path / "scaling.json").read_text())
    (report,) = written["scalings"]
    assert list(report["measured"]) == list(scaling.ROWS)
    for row in report["measured"].values():
        assert list(row) == ["1", "4", "8"] and all(entry["median"] > 0 for entry in row.values())
    # A number of ranks that cannot share the model's heads is named as failed, and the others are still reported.
    with pytest.raises(SystemExit, match="tp_size=3"):
        scaling.main(["embedded", "--tp-sizes", "3", "--results", str(tmp_path), *flags, *settings])
    assert json.loads((tmp_path / "scaling.json").read_text()) == written
