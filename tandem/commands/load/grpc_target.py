"""A Tandem server that is called over gRPC."""

import argparse
import functools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from tandem.commands.connection import DEFAULT_ADDRESS, credentials_of, metadata_of
from tandem.commands.load.target import Received, RequestFailed
from tandem.commands.load.workload import Ask
from tandem.v1 import inference_pb2
from tandem_shared.rpc.credentials import open_channel
from tandem_shared.rpc.grpc_options import client_options

METHOD = "/tandem.v1.InferenceService/GenerateStream"


@dataclass(frozen=True)
class GrpcTarget:
    options: argparse.Namespace
    """The flags of add_connection_flags."""
    model: str

    @property
    def _address(self) -> str:
        return self.options.address or DEFAULT_ADDRESS

    def description(self) -> dict[str, Any]:
        return {"api": "gRPC", "server": self._address, "model": self.model}

    def encode(self, ask: Ask) -> bytes:
        # Every field is set, so that a model's own defaults do not change what is measured.
        sampling = inference_pb2.SamplingParams(
            temperature=ask.temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=ask.seed
        )
        if isinstance(ask.prompt, str):
            message = inference_pb2.ChatMessage(role="user", content=ask.prompt)
            prompt = inference_pb2.Prompt(chat=inference_pb2.Chat(messages=[message]))
        else:
            prompt = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=ask.prompt))
        return inference_pb2.GenerateStreamRequest(
            prompt=prompt,
            sampling=sampling,
            stopping=inference_pb2.StoppingCriteria(max_tokens=ask.num_output_tokens, ignore_eos=True),
        ).SerializeToString()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["GrpcConnection"]:
        # Each process has its own connection, as the server deals out connections to its front ends.
        options = [*client_options(self._address), ("grpc.use_local_subchannel_pool", 1)]
        async with open_channel(self._address, credentials_of(self.options), options) as channel:
            yield GrpcConnection(functools.partial(channel.unary_stream(METHOD), metadata=metadata_of(self.options)))

    def parse(self, received: Received) -> tuple[list[float], list[int]]:
        replies = [inference_pb2.GenerateStreamResponse.FromString(part) for part in received.parts]
        pairs = [
            (at, len(reply.token_ids)) for at, reply in zip(received.times, replies, strict=True) if reply.token_ids
        ]
        return [at for at, _ in pairs], [count for _, count in pairs]


class GrpcConnection:
    def __init__(self, method: Any) -> None:
        self._method = method

    async def stream(self, request: bytes) -> Received:
        received = Received(time.monotonic(), [], [])
        call = self._method(request)
        try:
            while (part := await call.read()) is not grpc.aio.EOF:
                received.times.append(time.monotonic())
                received.parts.append(part)
        except grpc.RpcError as error:
            raise RequestFailed(f"{error.code().name}: {error.details()}") from error
        return received
