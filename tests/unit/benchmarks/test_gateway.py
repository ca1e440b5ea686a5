"""The comparison of HTTP with gRPC, at a small scale, and how it counts CPU time."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import gateway
from benchmarks.cpu_times import CpuTimes
from tandem.commands.load.workload import Workload

FEW = "--num-requests 6 --input-len 5-9 --output-len 4-8 --pairs 2 --rate 20 --num-rate-requests 4 --rate-pairs 1"
BURN = """
import subprocess, sys, time
child = sys.argv[1:] and subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
end = time.process_time() + 0.2
while time.process_time() < end:
    pass
if child:
    child.stdout.readline()
print(child.pid if child else 0, flush=True)
time.sleep(600)
"""
"""Uses CPU time, says so once it and its child have, if it has one, and then sleeps."""


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["", "--steady-step-ms 2 --apis completions"])
def test_it_runs_on_a_cpu(worker: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = f"{FEW} {worker} --clients 2 --http-workers 2 --set num_threads=1 --commit abc"
    gateway.main(["embedded", *flags.split(), "--out", str(out)])
    report = json.loads(out.read_text())
    assert (report["commit"], report["http_workers"]) == ("abc", 2)
    assert list(report["apis"]) == (["completions"] if worker else ["completions", "chat"])
    for api in report["apis"].values():
        assert [api[name]["rate"] for name in ("saturated", "moderate")] == ["inf", "20.0"]
        for measured, num_pairs in ((api["saturated"], 2), (api["moderate"], 1)):
            pairs = zip(measured["http"]["runs"], measured["grpc"]["runs"], strict=True)
            ratios = [http["output_tok_s"] / grpc["output_tok_s"] for http, grpc in pairs]
            assert measured["http_over_grpc_tok_s"]["pairs"] == pytest.approx(ratios, abs=1e-3)
            assert len(ratios) == num_pairs
            for name in ("grpc", "http"):
                assert 0 < measured[name]["ttft_ms"]["p50"] <= measured[name]["ttft_ms"]["p99"]
                assert all(run["cpus"]["clients"] > 0 for run in measured[name]["runs"])
            longer = measured["http"]["ttft_ms"]["p50"] - measured["grpc"]["ttft_ms"]["p50"]
            assert measured["ttft_p50_ms_longer"] == pytest.approx(longer, abs=1e-3)


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_requests_of_a_pair_differ_in_their_prompts_alone(is_chat: bool) -> None:
    asks = Workload((5, 30), (4, 8), 1000, 0.6, 0, is_chat).asks(8, math.inf, 1)
    for ask in asks:
        other = gateway._reversed(ask)
        assert other.prompt != ask.prompt and len(other.prompt) == len(ask.prompt)
        assert gateway._reversed(other) == ask and other.num_output_tokens == ask.num_output_tokens


def test_cpu_time_is_counted_by_role() -> None:
    children = [[], [], [], [BURN]]
    command = [sys.executable, "-c", BURN]
    processes = [subprocess.Popen([*command, *child], stdout=subprocess.PIPE) for child in children]
    told = []
    try:
        for process in processes:
            assert process.stdout is not None
            told.append(int(process.stdout.readline()))
        worker, http, _, scheduler = processes
        services: Any = SimpleNamespace(worker=worker, gateway=http, scheduler=scheduler)
        used = CpuTimes(services).read()
        pids = {"worker": worker.pid, "gateway": http.pid, "scheduler": scheduler.pid, "front_ends": told[3]}
        for role, pid in pids.items():
            truth = psutil.Process(pid).cpu_times()
            assert used[role] == pytest.approx(truth.user + truth.system, abs=0.03)
        # Other tests may have left children of this process.
        assert used["clients"] >= 0.2 and 0 < used["benchmark"] <= time.process_time() + 0.03
    finally:
        for pid in told[3:]:
            os.kill(pid, signal.SIGKILL)
        for process in processes:
            process.kill()
            process.wait()
