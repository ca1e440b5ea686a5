"""Calls whose messages are given as bytes, from several threads over several connections."""

import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import grpc
from grpc import StatusCode

from tandem_shared.rpc.grpc_options import CHANNEL_OPTIONS
from tests.chaos.messages.hostile_calls import Case
from tests.chaos.messages.statuses import ATTACH, TABLE
from tests.e2e.waiting import WAIT_S

NUM_CHANNELS = 4
DEADLINE_S = 0.5
"""The deadline of calls that may take long, and of streams without an end."""
MAX_REPLIES = 100
HELD_S = 0.02
"""How long a front end's stream stays open after its last message, so that the work it asked for begins."""


class Callers:
    """Makes calls to one address over several connections. Several threads may use it."""

    def __init__(self, address: str) -> None:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self.channels = [grpc.insecure_channel(address, options) for _ in range(NUM_CHANNELS)]

    def call(self, case: Case, *, has_time: bool = False) -> tuple[StatusCode, str]:
        """Status and details of a call. has_time: gives it a long deadline even if its RPC may take longer still."""
        is_short = StatusCode.DEADLINE_EXCEEDED in TABLE.get(case.rpc, ()) and not has_time
        compression = grpc.Compression.Gzip if case.kind == "compressed" else None
        channel = random.choice(self.channels)
        call: Any = channel.stream_stream(case.rpc)(
            _held(case) if case.rpc == ATTACH else iter(case.payloads),
            timeout=DEADLINE_S if is_short else WAIT_S,
            metadata=case.metadata,
            compression=compression,
            wait_for_ready=True,
        )
        try:
            for _ in itertools.islice(call, MAX_REPLIES):
                pass
            if call.is_active():
                call.cancel()
                return StatusCode.OK, "left after many replies"
        except grpc.RpcError:
            pass
        return call.code(), call.details() or ""

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


def _held(case: Case) -> Iterator[bytes]:
    yield from case.payloads
    time.sleep(HELD_S)
