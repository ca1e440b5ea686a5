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


def test_hits_are_of_the_prompts_that_were_admitted() -> None:
    # 500 tokens were accepted earlier, when the queue was long, and are admitted now.
    before = a_look(1, num_prompt_tokens=1000, num_admitted_prompt_tokens=500, num_cached_prompt_tokens=100)
    after = a_look(2, num_prompt_tokens=1100, num_admitted_prompt_tokens=1000, num_cached_prompt_tokens=500)
    assert lines(before, after)["prefix cache hits"] == "80% of the prompt tokens now, 50% since the start"
    assert lines(after, after)["prefix cache hits"] == "50% since the start"


def test_tokens_that_turn_out_to_be_overshoot_leave_the_output() -> None:
    before = a_look(1, num_output_tokens=100, num_overshoot_tokens=0)
    shown = lines(before, a_look(2, num_output_tokens=98, num_overshoot_tokens=4))
    assert (shown["output"], shown["overshoot"]) == ("0 tokens/s", "100.0% of the sampled tokens")


def test_a_server_that_was_started_again_counts_from_zero() -> None:
    before = a_look(100, num_step_results=1000, step_time_ns=10**11)
    shown = lines(before, a_look(1, num_step_results=5, step_time_ns=10**7))
    assert shown["step time"].startswith("2.00 ms; ")
