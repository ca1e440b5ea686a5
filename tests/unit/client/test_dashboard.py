"""What `tandem top` shows of two answers of a server."""

import io

from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from tandem.commands.dashboard import Look, draw
from tandem.v1 import control_pb2, inference_pb2


def a_look(at: float, **load: int) -> Look:
    """At `at` seconds after the server started."""
    server = control_pb2.GetServerInfoResponse(
        version="1.2", worker_state=control_pb2.WORKER_STATE_READY, uptime=Duration(seconds=int(at))
    )
    model = inference_pb2.GetModelInfoResponse(model="m", dtype="bfloat16")
    return Look(at, model, server, control_pb2.GetLoadResponse(**load))


def lines(before: Look, after: Look) -> dict[str, str]:
    """The shown values by their names."""
    console = Console(file=io.StringIO(), width=120)
    console.print(draw(before, after))
    file = console.file
    assert isinstance(file, io.StringIO)
    rows = [line.strip().split("  ", 1) for line in file.getvalue().splitlines()]
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_step_times_are_those_of_the_interval() -> None:
    counts = {
        "num_steps": 100,
        "num_step_results": 98,
        "step_time_ns": 10**9,
        "gpu_time_ns": 10**8,
        "gpu_gap_ns": 10**7,
    }
    before = a_look(10, **counts)
    # 200 steps in 2 s, that took 8 ms each; 7.5 ms of them on the GPU, which idled for 0.25 ms.
    more = {
        "num_steps": 200, "num_step_results": 200, "step_time_ns": 1_600_000_000, "gpu_time_ns": 1_500_000_000,
        "gpu_gap_ns": 50_000_000,
    }  # fmt: skip
    after = a_look(12, **{name: counts[name] + more[name] for name in counts}, num_steps_in_flight=2)
    shown = lines(before, after)
    assert shown["steps"] == "100.0/s, 2 in flight"
    assert shown["step time"] == "8.00 ms, 7.50 ms on the GPU, 0.25 ms idle before; worker 80% busy"


def test_a_cpu_has_no_times_of_a_gpu() -> None:
    shown = lines(a_look(1), a_look(2, num_step_results=10, step_time_ns=500_000_000))
    assert shown["step time"] == "50.00 ms; worker 50% busy"


def test_without_steps_there_is_no_time() -> None:
    load = {"num_step_results": 10, "step_time_ns": 10**9}
    assert lines(a_look(1, **load), a_look(2, **load))["step time"] == "no step has ended"


def test_a_server_that_was_started_again_counts_from_zero() -> None:
    before = a_look(100, num_step_results=1000, step_time_ns=10**11)
    shown = lines(before, a_look(1, num_step_results=5, step_time_ns=10**7))
    assert shown["step time"].startswith("2.00 ms; ")
