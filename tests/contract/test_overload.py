"""Thousands of calls at once: each is answered or refused with a reason, and a polite client is served meanwhile."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.grpc_options import CHANNEL_OPTIONS
from tandem.v1 import inference_pb2_grpc
from tests.contract.services import WAIT_S, Services, model_info, stream_request
from tests.fake_worker import FakeRunner

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_CALLS = 4000
"""More than the 3,000 that gRPC keeps by default until Python takes them."""


async def test_each_call_of_a_flood_gets_a_reason_and_a_polite_client_is_served() -> None:
    results = threading.Semaphore(0)
    # No result comes until the flood is over, so what the engine took stays open.
    runner = FakeRunner(model_info(), gate=results)
    async with Services(runner, max_num_seqs=8, max_num_waiting=800) as services:
        command = [sys.executable, "-m", "tests.contract.hostile_client", services.address, "3", str(NUM_CALLS)]
        hostile = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        with hostile:
            assert hostile.stdout is not None
            # It holds up this event loop: connections need no Python, and the calls gather in gRPC.
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
    assert sum(counts.values()) == NUM_CALLS
    assert counts["OK"] >= 600
