"""Thousands of calls at once: each is answered or refused with a reason, and a polite client is served meanwhile."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.v1 import inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.contract.services import WAIT_S, Services, model_info, stream_request
from tests.support.fake_worker import FakeRunner

REPOSITORY = Path(__file__).resolve().parents[2]
GRPC_PATIENCE_S = 30.0
"""After this time gRPC ends calls that Python has not taken: CANCELLED, without a reason."""


@pytest.mark.parametrize(
    ("num_calls", "wait_s"), [(1200, 1.0), pytest.param(6000, GRPC_PATIENCE_S + 2, marks=pytest.mark.slow)]
)
async def test_each_call_of_a_flood_gets_a_reason_and_a_polite_client_is_served(num_calls: int, wait_s: float) -> None:
    results = threading.Semaphore(0)
    # No result comes until the flood is over, so what the engine took stays open.
    runner = FakeRunner(model_info(), gate=results)
    async with Services(runner, max_num_seqs=8, max_num_waiting=800) as services:
        command = [sys.executable, "-m", "tests.contract.hostile_client", services.address, "3"]
        hostile = subprocess.Popen(
            [*command, str(num_calls), str(wait_s)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        with hostile:
            assert hostile.stdout is not None
            # This blocks the event loop. Connections need no Python, so the calls gather in gRPC.
            assert hostile.stdout.readline() == "under way\n"
            own_connection = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(services.address, own_connection) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)).status
                inference = inference_pb2_grpc.InferenceServiceStub(channel)
                polite = inference.GenerateStream(stream_request([4], 2))
                await services.wait_load(lambda load: load.num_waiting_sequences > 500, "the flood waits")
                assert hostile.poll() is None
                results.release(1_000_000)
                assert sum([len(message.token_ids) async for message in polite]) == 2
            counts = json.loads(await asyncio.to_thread(hostile.stdout.readline))
    assert set(counts) == {"OK", "RESOURCE_EXHAUSTED QueueFull retry later"}
    assert sum(counts.values()) == num_calls
    assert counts["OK"] >= 600
