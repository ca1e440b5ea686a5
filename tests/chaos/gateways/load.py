"""Clients of an HTTP gateway that send the same requests again and again, over real connections, and compare each
answer with the true one.

The true answer is what a unary call gave for the same request when nothing disturbed it, so streams are held against
unary answers too.
"""

import asyncio
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx2

from tests.chaos.gateways.answers import Answer, WrongAnswer
from tests.chaos.gateways.requests import KINDS, RESPONSES, make_request, num_sequences
from tests.chaos.support.client_thread import ClientThread

PAUSE_S = 0.1
"""The pause before a request that was refused is sent again."""
MAX_FAULTS = 20
BROKEN = "broken"
UNAVAILABLE = "503"


@dataclass(frozen=True)
class Ending:
    """A call that ended otherwise than with its answer, and whose request is sent again with the same id."""

    number: int
    """The client's number."""
    how: str
    """BROKEN if the connection ended; else the status, also that of an error that ended a stream."""
    details: str
    began_at: float
    num_events: int
    has_advice: bool
    """Whether it came with the time after which to try again."""


class NoAnswer(Exception):
    """An error in OpenAI's form."""

    def __init__(self, how: str, details: str, has_advice: bool) -> None:
        super().__init__(details)
        self.how = how
        self.details = details
        self.has_advice = has_advice


class HttpLoad(ClientThread):
    """Clients in an event loop and a thread of their own. A context manager, which learns the true answers on entry."""

    def __init__(self, url: str, num_clients: int, *, num_tokens: int, first_number: int = 0) -> None:
        """first_number: that of the first client, by which requests differ. num_tokens: of the shortest answer."""
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        """Descriptions of what was wrong, the first MAX_FAULTS of them."""
        self.endings: list[Ending] = []
        """Whoever reads them clears the list."""
        self.open_since: dict[int, float] = {}
        """When (time.monotonic()) each client's open call began."""
        self.arrivals: list[float] = []
        """When events came, of all streams."""
        self.answers_of: Counter[int] = Counter()
        """The number of whole answers, right or wrong, by client."""
        self.numbers = range(first_number, first_number + num_clients)
        self._url = url
        self._requests = {number: make_request(number, num_tokens) for number in self.numbers}
        self.num_sequences = sum(num_sequences(*request) for request in self._requests.values())
        """The most sequences that the clients have in the scheduler."""
        self._truth: dict[int, Answer] = {}
        self._serial = itertools.count()

    def __enter__(self) -> "HttpLoad":
        self._thread.start()
        try:
            self._run(self._open())
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self) -> None:
        self._start(self.numbers)

    @property
    def found(self) -> dict[str, Any]:
        """What the load found, in the form that a results file keeps."""
        return {
            "clients": len(self.numbers),
            "answers": self.counts["answers"],
            "events": self.counts["events"],
            "wrong": self.counts["wrong"],
            "faults": self.faults,
        }

    async def _open(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(base_url=self._url, limits=limits, timeout=None, trust_env=False)
        answers = await asyncio.gather(*map(self._learn, self.numbers))
        self._truth = dict(zip(self.numbers, answers, strict=True))

    async def _close(self) -> None:
        await self._client.aclose()

    async def _learn(self, number: int) -> Answer:
        path, body = self._requests[number]
        unary = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        answer = Answer()
        await self._ask(path, unary, f"truth-{number}", answer, None)
        assert len(answer.finishes) >= num_sequences(path, body), f"undisturbed, request {number} had {answer}"
        return answer

    async def _ask(
        self, path: str, body: dict[str, Any], request_id: str, answer: Answer, truth: Answer | None
    ) -> None:
        """Fills the answer, and compares it with the true one if that is given. Raises NoAnswer, WrongAnswer or
        httpx2.TransportError.
        """
        headers = {"x-request-id": request_id}
        async with self._client.stream("POST", path, json=body, headers=headers) as reply:
            if reply.headers.get("x-request-id") != request_id:
                raise WrongAnswer(f"the answer's id is {reply.headers.get('x-request-id')}")
            if reply.status_code != httpx2.codes.OK:
                error = json.loads(await reply.aread())["error"]
                raise NoAnswer(str(reply.status_code), f"{error}", "retry-after" in reply.headers)
            if not body.get("stream"):
                answer.add(path, json.loads(await reply.aread()))
            else:
                await self._read_events(path, reply, answer, truth)
        if truth is not None:
            answer.check(truth, is_ended=True)

    async def _read_events(self, path: str, reply: httpx2.Response, answer: Answer, truth: Answer | None) -> None:
        is_done = False
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if is_done:
                raise WrongAnswer(f"after the end {line[:100]}")
            if line == "data: [DONE]":
                is_done = True
                continue
            said = json.loads(line.removeprefix("data: "))
            if error := said.get("error"):
                how = UNAVAILABLE if error["type"] == "service_unavailable_error" else error["type"]
                raise NoAnswer(how, f"{error}", has_advice=False)
            answer.add(path, said)
            answer.num_events += 1
            self.counts["events"] += 1
            self.arrivals.append(time.monotonic())
            if truth is not None:
                answer.check(truth, is_ended=False)
        if not is_done and path != RESPONSES:
            raise WrongAnswer("a stream without its end")

    async def _run_client(self, number: int) -> None:
        while not self._is_last:
            request_id = f"http-{number}-{next(self._serial)}"
            while not await self._try_once(number, request_id):
                await asyncio.sleep(PAUSE_S)

    async def _try_once(self, number: int, request_id: str) -> bool:
        """Sends the request. Returns False if it must be sent again."""
        path, body = self._requests[number]
        answer = Answer()
        began_at = self.open_since[number] = time.monotonic()
        try:
            await self._ask(path, body, request_id, answer, self._truth[number])
        except NoAnswer as error:
            ending = Ending(number, error.how, error.details, began_at, answer.num_events, error.has_advice)
            self.endings.append(ending)
            return False
        except httpx2.TransportError as error:
            self.endings.append(Ending(number, BROKEN, repr(error), began_at, answer.num_events, False))
            return False
        except WrongAnswer as error:
            self.counts["wrong"] += 1
            if len(self.faults) < MAX_FAULTS:
                kind = list(KINDS)[number % len(KINDS)]
                self.faults.append(f"{request_id} ({kind}, stream {body.get('stream', False)}): {error}")
        else:
            self.counts["answers"] += 1
        finally:
            del self.open_since[number]
        self.answers_of[number] += 1
        return True
