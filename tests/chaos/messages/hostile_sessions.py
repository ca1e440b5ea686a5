"""Sessions with a worker in which one message is hostile, after some valid plans.

The scheduler's core makes the plans for a few sequences, with the fake worker. A session sends some of them, and then
something else in place of the next one. The true tokens are those that the worker gave for the plans before anything
had disturbed it. The valid plans of each later session must give the same tokens, which shows that a refused session
has left nothing behind. The fake worker, written independently of the worker's own check, says whether a plan must be
refused.
"""

import copy
import queue
import random
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc import StatusCode
from hypothesis import strategies as st

from tandem.internal.v1 import worker_pb2, worker_pb2_grpc
from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import SchedulerConfig
from tandem_shared.errors import InvalidPlan
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_codec import PROTOCOL_VERSION, decode_plan, encode_plan, unpack_ids
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tests.chaos.messages.hostile_bytes import draw, hostile, mutated, swept
from tests.chaos.messages.rows_of_plans import is_wrong
from tests.chaos.messages.statuses import TABLE
from tests.support.builders import create_request
from tests.support.engine import Engine
from tests.support.fake_worker import BrokenPlan, FakeRunner

RPC = "/tandem.internal.v1.WorkerService/ExecuteSteps"
WAIT_S = 30.0
TAKEN_FROM_SCRIPT = 12
LISTS = SamplingLists(
    stop_token_ids=(5,),
    logit_bias=((6, 2.0), (7, -2.0)),
    allowed_token_ids=tuple(range(64)),
    bad_words=((8, 9), (10,)),
    logprob_token_ids=(11,),
)
NUM_REPEATED = 32
"""How often one plan is sent: more often than a worker lets plans wait for results."""
MAX_DECODED_BYTES = 100_000
CONTENT_PROBLEMS = (
    "written twice", "which [", "unwritten", "foreign", "has a block twice", "reads blocks of", "outgrows", "cached=",
    "tokens are cached",
)  # fmt: skip
"""What the fake worker says of plans that use blocks of other sequences, or that report only a part of a prompt. The
real one cannot know, or need not care, and obeys.
"""


@dataclass(frozen=True)
class HostileSession:
    """kind: what is hostile. num_plans: the number of valid plans before it. payload: the hostile message."""

    kind: str
    num_plans: int
    payload: bytes


@dataclass
class Outcome:
    code: StatusCode
    details: str
    num_right: int
    """The number of valid plans that had their true results"""
    fault: str = ""


class Script:
    """Valid plans, and the fake worker's state before each."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.plans: list[StepPlan] = []
        self._states: list[FakeRunner] = []
        runner = FakeRunner(info)
        engine = Engine(Scheduler(SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=40), info), runner)
        rng = np.random.default_rng(0)
        for number in range(8):
            sampling = RowSampling(
                temperature=0.7 * (number % 2),
                presence_penalty=0.5 if number == 4 else 0.0,
                repetition_penalty=1.25 if number == 5 else 1.0,
                min_tokens=2 if number == 3 else 0,
                seed=number,
                num_logprobs=3 if number == 2 else None,
                num_prompt_logprobs=1 if number == 1 else None,
            )
            prompt = rng.integers(0, info.vocab_size, 5 + 9 * number).tolist()
            lists = LISTS if number == 3 else NO_LISTS
            engine.add(create_request(number, prompt, 3 + number, sampling=sampling, lists=lists))
        while len(self.plans) < TAKEN_FROM_SCRIPT:
            state = copy.deepcopy(runner)
            plan = engine.launch()
            if plan is None:
                break
            self._states.append(state)
            self.plans.append(plan)
            engine.deliver()

    def requests(self) -> list[worker_pb2.ExecuteStepsRequest]:
        return [worker_pb2.ExecuteStepsRequest(plan=encode_plan(plan)) for plan in self.plans]

    def must_refuse(self, num_plans: int, payload: bytes) -> bool | None:
        """Whether a message that comes after num_plans plans must be INVALID_ARGUMENT. None if the worker may also obey
        it, though its tokens would be wrong.
        """
        if len(payload) > MAX_DECODED_BYTES:
            # The worker may refuse it for its size, and decoding it would take long here too.
            return None
        try:
            request = worker_pb2.ExecuteStepsRequest.FromString(payload)
            if request.WhichOneof("kind") != "plan":
                return True
            plan = decode_plan(request.plan)
        except (DecodeError, InvalidPlan):
            return True
        if any(new.lists.grammar is not None for new in plan.added_rows):
            # What is wrong with a grammar shows when it is compiled.
            return None
        if any(is_wrong(new, self.info) for new in plan.added_rows):
            return True
        try:
            copy.deepcopy(self._states[num_plans]).execute(plan)
        except BrokenPlan as error:
            is_content = any(problem in str(error) for problem in CONTENT_PROBLEMS)
            is_full = f"{self.info.max_model_len} tokens in a new row" in str(error)
            return None if is_content or is_full else True
        except ValueError:
            # Arrays that should be equally long are not.
            return True
        return False


def _drawn_sessions(script: Script, opening: worker_pb2.OpenSession) -> st.SearchStrategy[HostileSession]:
    def again() -> worker_pb2.ExecuteStepsRequest:
        return worker_pb2.ExecuteStepsRequest(open=opening)

    requests = script.requests()
    anything = [hostile(lambda request=request: copy.deepcopy(request)) for request in requests]
    # Most of these are refused by the first checks; changed plans get further.
    changed = [
        mutated(lambda request=request: copy.deepcopy(request)).map(lambda plan: ("changed", plan.SerializeToString()))
        for request in requests
    ]
    num_plans = st.integers(0, len(requests) - 1)
    plans, changed_plans = (
        num_plans.flatmap(lambda n, each=each: each[n].map(lambda drawn: HostileSession(drawn[0], n, drawn[1])))
        for each in (anything, changed)
    )
    openings = mutated(again).map(worker_pb2.ExecuteStepsRequest.SerializeToString)
    others = st.builds(HostileSession, st.sampled_from(["opened again", "rival"]), num_plans, openings)
    first = st.builds(
        HostileSession, st.just("opened wrongly"), st.just(0), openings | hostile(again).map(lambda d: d[1])
    )
    flood = st.builds(HostileSession, st.just("repeated"), num_plans, st.just(b""))
    strategies = [plans] * 4 + [changed_plans] * 8 + [others, others, first, flood]
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


def draw_sessions(script: Script, opening: worker_pb2.OpenSession, count: int, seed: int) -> list[HostileSession]:
    """`count` sessions in random order. opening: one that the worker accepts. Up to four fifths of the sessions have
    one field of a plan at a limit: each combination of field and value at most once, in a random plan.
    """
    by_change: dict[str, list[HostileSession]] = {}
    for number, request in enumerate(script.requests()):
        for change, payload in swept(lambda request=request: copy.deepcopy(request)):
            by_change.setdefault(change, []).append(HostileSession("at a limit", number, payload))
    choose = random.Random(seed)
    changes = choose.sample(sorted(by_change), min(count * 4 // 5, len(by_change)))
    chosen = [choose.choice(by_change[change]) for change in changes]
    sessions = chosen + draw(_drawn_sessions(script, opening), count - len(chosen), seed)
    choose.shuffle(sessions)
    return sessions


class Sessions:
    """Tries hostile sessions one after the other on a worker that has no other session."""

    def __init__(self, channel: grpc.Channel, script: Script, opening: worker_pb2.OpenSession) -> None:
        self._stub = worker_pb2_grpc.WorkerServiceStub(channel)
        self._raw = channel.stream_stream(RPC, None, worker_pb2.ExecuteStepsResponse.FromString)
        self._script = script
        self._plans = [request.SerializeToString() for request in script.requests()]
        self._opening = opening
        self._epoch = 0
        self.truth = [result.token_ids for result in self._learn()]

    def _learn(self) -> list[worker_pb2.StepResult]:
        stream = self._open()
        results = [stream.ask(plan).result for plan in self._plans]
        stream.end()
        return results

    def attempt(self, hostile: HostileSession) -> Outcome:
        if hostile.kind == "opened wrongly":
            stream = Stream(self._raw)
            stream.send(hostile.payload)
            stream.read()
            return self._judged(stream.end(), 0)
        stream, num_right = self._open(), 0
        for plan, truth in zip(self._plans[: hostile.num_plans], self.truth, strict=False):
            response = stream.ask(plan)
            if response is None or response.result.token_ids != truth:
                return replace(self._judged(stream.end(), num_right), fault="a right plan did not give the true tokens")
            num_right += 1
        if hostile.kind == "rival":
            return self._try_rival(stream, hostile, num_right)
        if hostile.kind == "repeated":
            for _ in range(NUM_REPEATED):
                stream.send(self._plans[hostile.num_plans])
            while stream.read() is not None:
                pass
            return self._judged(stream.end(), num_right, must_refuse=True)
        response = stream.ask(hostile.payload)
        outcome = self._judged(
            stream.end(), num_right, must_refuse=self._script.must_refuse(hostile.num_plans, hostile.payload)
        )
        if response is not None and response.WhichOneof("kind") == "result":
            tokens = unpack_ids(response.result.token_ids)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self._script.info.vocab_size:
                outcome.fault = f"tokens that are none: {tokens.tolist()}"
        return outcome

    def _try_rival(self, stream: "Stream", hostile: HostileSession, num_right: int) -> Outcome:
        """Another caller opens a session while this one lives; then this one goes on."""
        rival = Stream(self._raw)
        rival.send(hostile.payload)
        has_opened = rival.read() is not None
        outcome = self._judged(rival.end(), num_right)
        if not has_opened:
            response = stream.ask(self._plans[num_right])
            if response is None or response.result.token_ids != self.truth[num_right]:
                outcome.fault = "a session was disturbed by one that was refused"
        elif num_right:
            request = worker_pb2.ExecuteStepsRequest.FromString(hostile.payload)
            if request.open.scheduler_id != self._opening.scheduler_id or request.open.session_epoch <= self._epoch:
                outcome.fault = "a session was taken that had sent plans"
        stream.end()
        return outcome

    def _judged(self, end: tuple[StatusCode, str], num_right: int, *, must_refuse: bool | None = None) -> Outcome:
        code, details = end
        outcome = Outcome(code, details, num_right)
        if code not in TABLE[RPC]:
            outcome.fault = "not among the statuses of this RPC"
        elif must_refuse is True and code is not StatusCode.INVALID_ARGUMENT:
            outcome.fault = "must be INVALID_ARGUMENT"
        elif must_refuse is False and code is not StatusCode.OK:
            outcome.fault = "a plan that is right was refused"
        return outcome

    def _open(self) -> "Stream":
        """Opens a session with a newer epoch, as the worker may not have seen the end of the last one yet."""
        self._epoch += 1
        stream = Stream(self._raw)
        opening = worker_pb2.OpenSession()
        opening.CopyFrom(self._opening)
        opening.session_epoch = self._epoch
        response = stream.ask(worker_pb2.ExecuteStepsRequest(open=opening).SerializeToString())
        assert response is not None and response.WhichOneof("kind") == "opened", stream.end()
        return stream


class Stream:
    """A call of ExecuteSteps whose messages are bytes."""

    def __init__(self, method: Any) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = method(iter(self._messages.get, None), timeout=WAIT_S, wait_for_ready=True)

    def send(self, payload: bytes) -> None:
        self._messages.put(payload)

    def read(self) -> Any:
        """The next response that is not progress; None at a last word or at the end."""
        try:
            for response in self._call:
                if response.WhichOneof("kind") == "last_word":
                    status_pb2.Status.FromString(response.last_word)
                    return None
                if response.WhichOneof("kind") != "progress":
                    return response
        except grpc.RpcError:
            pass
        return None

    def ask(self, payload: bytes) -> Any:
        self.send(payload)
        return self.read()

    def end(self) -> tuple[StatusCode, str]:
        """Closes the sending side and reads what is left. Returns status and details."""
        self._messages.put(None)
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        return self._call.code(), self._call.details() or ""


def opening_of(info: WorkerInfo) -> worker_pb2.OpenSession:
    return worker_pb2.OpenSession(
        protocol_version=PROTOCOL_VERSION,
        scheduler_id="hostile",
        session_epoch=1,
        worker_instance_id=info.worker_instance_id,
        num_live_sequences=1,
    )
