"""Front ends in virtual time: the product's own, in the step loop's process or behind a stream that may be slow, stall
or break. Of all that lies between client and engine only gRPC itself is missing.
"""

import asyncio
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any
from unittest.mock import patch

import grpc
from tokenizers import Tokenizer

from tandem_scheduler.engine.hub import Attachment, EngineHub
from tandem_scheduler.engine_interface import EngineState, OutputBatch, TraceContext
from tandem_scheduler.front_end.front_end import FrontEnd
from tandem_scheduler.front_end.grpc_api.inference_servicer import InferenceServicer
from tandem_scheduler.front_end.live_request import LiveRequest
from tandem_scheduler.front_end.validation import GenerationRequest
from tandem_scheduler.processes.engine_side.engine_servicer import EngineServicer
from tandem_scheduler.processes.front_end_side.remote_engine import RemoteEngine
from tandem_shared.errors import WorkerUnavailable
from tests.chaos.simulation.worker import now

CONNECT_TIMEOUT_S = 30.0


class InjectedFault(Exception):
    """What the harness raises inside Tandem."""


class SimulatedFrontEnd(FrontEnd):
    """A front end in the step loop's process. As the listener of its engine it raises when the world says so."""

    def __init__(self, tokenizer: Tokenizer, rng: Random, events: Counter[str]) -> None:
        super().__init__(tokenizer, self._note_ready, has_traces=True)
        self._events = events
        self._is_told = False
        self.servicer = InferenceServicer(self, "fake")
        self.calls: list[asyncio.Task[None]] = []
        self.opened: weakref.WeakSet[LiveRequest] = weakref.WeakSet()
        self.is_to_raise = self.has_raised = self.is_gone = False
        """is_gone: its calls end UNAVAILABLE, or vanish with their connections."""
        self._rng = rng

    async def start(self, hub: EngineHub, _: EngineServicer) -> None:
        self._hub = hub
        self._attachment = hub.attach(self)
        self.connect(self._attachment)

    async def leave(self) -> None:
        """Ends with the scheduler service, after the drain. Nothing is to be done in the same process."""

    def die(self) -> None:
        """Ends at once, with all connections. The engine may see it before or after the calls are gone."""
        self.is_gone = True
        cut_first = self._rng.random() < 0.5
        if cut_first:
            self._cut()
        for call in self.calls:
            call.cancel()
        if not cut_first:
            asyncio.get_running_loop().call_soon(self._cut)

    def _cut(self) -> None:
        self._hub.detach(self._attachment)

    async def open(
        self, request: GenerationRequest, arrived_at: float | None = None, trace: TraceContext | None = None
    ) -> LiveRequest:
        live = await super().open(request, arrived_at, trace)
        self.opened.add(live)
        return live

    def on_outputs(self, batch: OutputBatch) -> None:
        if self.is_to_raise:
            self.is_to_raise = False
            self.has_raised = True
            self._events["listener raises"] += 1
            if self._rng.random() < 0.5:
                super().on_outputs(batch)
            raise InjectedFault
        super().on_outputs(batch)

    async def on_state(self, state: EngineState) -> None:
        await super().on_state(state)
        if self._is_told and self._rng.random() < 0.1:
            raise InjectedFault
        self._is_told = True

    async def _note_ready(self, is_ready: bool) -> None:
        pass

    # For checks of the world

    @property
    def attachment(self) -> Attachment | None:
        """The engine's side, whose books must always equal those of this front end. None if a stream lies between."""
        return None if self.is_gone else self._attachment

    @property
    def handles(self) -> set[int]:
        """The handles of the sequences that have not ended."""
        return {*self._choices, *self._stopped}

    @property
    def lives(self) -> dict[int, LiveRequest]:
        return self._lives


class RemoteFrontEnd(SimulatedFrontEnd):
    """A front end in a process of its own: does what front_end_process.serve() does, on a stream without gRPC."""

    def __init__(self, tokenizer: Tokenizer, rng: Random, events: Counter[str]) -> None:
        super().__init__(tokenizer, rng, events)
        self.link = Link(rng)

    async def start(self, hub: EngineHub, servicer: EngineServicer) -> None:
        self._channel = _Channel(servicer, self.link)
        with patch("grpc.aio.insecure_channel", lambda *_: self._channel):
            self._remote = RemoteEngine("")
        await self._remote.connect(CONNECT_TIMEOUT_S)
        self.connect(self._remote)
        self._running = asyncio.create_task(self._serve())

    async def leave(self) -> None:
        await asyncio.wait([self._running])

    def break_off(self) -> None:
        """Breaks the stream while both ends live on."""
        self.is_gone = True
        self._channel.call.break_off()

    def _cut(self) -> None:
        self._running.cancel()
        self._channel.call.cancel()

    async def _serve(self) -> None:
        try:
            await self._remote.run(self)
        except WorkerUnavailable:
            pass
        finally:
            self.end_all(WorkerUnavailable("the server is stopping"))
            await self._remote.close()

    @property
    def attachment(self) -> None:
        return None


class Link:
    """The delay of messages on a stream, in virtual seconds."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._slowness = rng.choice([0.0, 0.1, 0.9])
        self._stalled_until = 0.0

    def stall(self, seconds: float) -> None:
        self._stalled_until = now() + seconds

    def was_stalled(self, within_s: float) -> bool:
        return self._stalled_until > now() - within_s

    async def delay(self) -> None:
        if self._rng.random() < self._slowness:
            await asyncio.sleep(self._rng.choice([0.0, 0.001, 0.02, 0.1]))
        while self._stalled_until > now():
            await asyncio.sleep(self._stalled_until - now())


class _Channel:
    """The methods of a gRPC channel that RemoteEngine uses."""

    def __init__(self, servicer: EngineServicer, link: Link) -> None:
        self._servicer = servicer
        self._link = link

    def stream_stream(self, *_: Any, **__: Any) -> Callable[..., "_Call"]:
        def attach(requests: AsyncIterator[Any], **_: Any) -> _Call:
            self.call = _Call(self._servicer, requests, self._link)
            return self.call

        return attach

    def unary_unary(self, *_: Any, **__: Any) -> None:
        """A stub for control RPCs, which is never called: the world asks the hub itself."""

    async def close(self) -> None:
        pass


class _Call:
    """A stream of EngineService.Attach."""

    def __init__(self, servicer: EngineServicer, requests: AsyncIterator[Any], link: Link) -> None:
        self._servicer = servicer
        self._link = link
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._carrying = asyncio.create_task(self._carry(requests))

    async def read(self) -> Any:
        message = await self._arrived.get()
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        self._carrying.cancel()

    def break_off(self) -> None:
        self._carrying.cancel()
        nothing = grpc.aio.Metadata()
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "broken pipe")
        self._arrived.put_nowait(error)

    async def _carry(self, requests: AsyncIterator[Any]) -> None:
        messages = self._servicer.Attach(self._delayed(requests), None)  # type: ignore[arg-type]
        try:
            async for message in messages:
                await self._link.delay()
                self._arrived.put_nowait(message)
            self._arrived.put_nowait(grpc.aio.EOF)
        finally:
            await messages.aclose()  # type: ignore[attr-defined]

    async def _delayed(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            await self._link.delay()
            yield request
