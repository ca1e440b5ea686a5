"""A process that floods a server: `python -m tests.contract.hostile_client ADDRESS CONNECTIONS CALLS SECONDS`.

Opens all calls at once, prints a line so many seconds later, waits for all ends, and prints as JSON how many ended how.
"""

import asyncio
import json
import sys
from collections import Counter

import grpc

from tandem.v1 import inference_pb2_grpc
from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tandem_shared.rpc.rich_status import error_of
from tests.contract.services import stream_request


async def end_of(stub: inference_pb2_grpc.InferenceServiceStub) -> str:
    """How a call ends: OK, or its code, the class of its error, and whether that says when to try again."""
    try:
        async for _ in stub.GenerateStream(stream_request([1, 2, 3], 1)):
            pass
    except grpc.aio.AioRpcError as error:
        told = error_of(error)
        retry = "retry later" if getattr(told, "retry_after_s", 0) > 0 else ""
        return f"{error.code().name} {type(told).__name__} {retry}"
    return "OK"


async def flood(address: str, num_connections: int, num_calls: int, under_way_s: float) -> None:
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(num_connections)]
    for channel in channels:
        await channel.channel_ready()
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    tasks = [asyncio.create_task(end_of(stubs[index % num_connections])) for index in range(num_calls)]
    await asyncio.sleep(under_way_s)
    print("under way", flush=True)
    print(json.dumps(Counter(await asyncio.gather(*tasks))), flush=True)


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
