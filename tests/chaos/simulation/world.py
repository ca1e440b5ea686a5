"""A simulated world: the scheduler's step loop, hub and core, front ends with their clients, and a worker, in virtual
time. What happens in a world is a function of its seed alone.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random
from unittest.mock import patch

from tandem_scheduler.core.suspects import PROBE_ID
from tandem_scheduler.core.types import SchedulerConfig, SequenceRequest
from tandem_scheduler.engine.hub import EngineHub
from tandem_scheduler.engine.observer import all_of
from tandem_scheduler.engine.step_loop import StepLoop
from tandem_scheduler.engine_interface import HEARTBEAT_S
from tandem_scheduler.front_end import live_request
from tandem_scheduler.processes.engine_side.engine_servicer import EngineServicer
from tandem_shared.errors import TandemError, WorkerUnavailable
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import StepPlan, WorkerInfo
from tests.chaos.simulation.calls import Call, make_request
from tests.chaos.simulation.checks import WatchedSink, check_books, check_end, check_error, watched_log
from tests.chaos.simulation.faults import FAULTS
from tests.chaos.simulation.front_end import RemoteFrontEnd, SimulatedFrontEnd
from tests.chaos.simulation.metrics import WatchedMetrics
from tests.chaos.simulation.traces import WatchedTraces
from tests.chaos.simulation.truths import WrongAnswer
from tests.chaos.simulation.wishes import VOCAB_SIZE
from tests.chaos.simulation.worker import Flaw, SimulatedWorker, now, random_size
from tests.support.builders import worker_info
from tests.support.tokenizers import embedded

TOKENIZER = embedded()

MAX_TOKENS_PER_DELTA = 6
"""Small, so that slow readers take even the short outputs of this simulation in several messages."""

TIMEOUTS_S = (0.0, 0.01, 0.1, 1.0, 5.0)
"""The timeouts of the calls that have a deadline."""
STUCK_S = 10.0
"""The longest that a sound worker may give no result while sequences are live."""
LIMIT_S = 1800.0
"""The virtual time within which a world must complete its steps, whatever breaks."""


class World:
    """A world, which is run once. `failures` then says which promises were broken, and when in virtual time."""

    step_timeout_s = 5.0
    worker_wait_s = 10.0

    def __init__(self, seed: int, num_steps: int) -> None:
        self.rng = Random(seed)
        self.failures: list[str] = []
        self.events: Counter[str] = Counter()
        self.num_steps = 0
        self.seconds = 0.0
        """How long the world lasted, in virtual seconds."""
        self.calls: list[Call] = []
        """All calls ever made; a call's serial number is its place, counted from 1."""
        self.sequences: dict[int, tuple[Call, int]] = {}
        """Call and choice of each sequence that was ever admitted, by sequence id."""
        self.planned: dict[int, int] = {}
        """The prompt tokens of each sequence that was ever in a plan, whether or not that reached the worker."""
        self.is_stopping = False
        self.is_cut_short = False
        """Whether the drain at the end is cut short, so that live requests end UNAVAILABLE."""
        self._num_wanted = num_steps
        self._is_over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> "World":
        self._loop = asyncio.get_running_loop()
        try:
            with watched_log(self), patch.object(live_request, "MAX_TOKENS_PER_DELTA", MAX_TOKENS_PER_DELTA):
                await self._live()
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")
        self.seconds = now()
        return self

    # What the worker and the checks report

    def fail(self, what: str) -> None:
        self.failures.append(f"at {self._loop.time():.3f} s: {what}")
        self._is_over.set()

    def count(self, event: str) -> None:
        self.events[event] += 1

    def admit(self, sequence_id: int, sampling: RowSampling) -> tuple[str, Flaw | None]:
        call = self.calls[sampling.seed - 1]
        call.is_admitted = True
        self.sequences[sequence_id] = (call, sampling.choice_index)
        flaw = call.asked.flaw if sampling.choice_index == call.asked.flawed_choice else None
        return call.asked.message.cache_salt, flaw

    def note_step(self) -> None:
        self.num_steps += 1
        if self.num_steps >= self._num_wanted:
            self._is_over.set()

    # The course of a world

    async def _live(self) -> None:
        rng = self.rng
        info = random_worker(rng)
        self.worker_infos = [info]
        """All workers that the scheduler may know."""
        self.worker = SimulatedWorker(self, info)
        self.metrics = WatchedMetrics(self)
        self.traces = WatchedTraces(self, self.metrics.times)
        # The traces read times that the metrics forget at the end of a call.
        observe = all_of(self.traces.tell, self.metrics.tell)
        self.hub = EngineHub(observe)
        self.sink = WatchedSink(self, self.hub)
        self.config = random_config(rng)
        self.step_loop = _WatchedLoop(
            self.worker,
            self.config,
            self.sink,
            scheduler_id="simulated",
            worker_wait_s=self.worker_wait_s,
            step_timeout_s=self.step_timeout_s,
            observer=observe,
        )
        self.step_loop.world = self
        self.hub.connect(self.step_loop)
        self.servicer = EngineServicer(self.hub, lambda process_id: None)
        self.front_ends: list[SimulatedFrontEnd] = []
        self.lost_front_ends: list[SimulatedFrontEnd] = []
        for kind in [rng.choice([SimulatedFrontEnd, RemoteFrontEnd]) for _ in range(rng.randint(1, 3))]:
            self.front_ends.append(await self._start_front_end(kind))
        running = asyncio.create_task(self.step_loop.run())
        running.add_done_callback(lambda _: None if self._is_over.is_set() else self.fail("the step loop ended"))
        think_s = rng.choice([0.0, 0.05, 0.5])
        helpers = [self._beat(), self._break_things(), *(self._ask_on(think_s) for _ in range(rng.randint(3, 14)))]
        self._tasks = [asyncio.create_task(helper) for helper in helpers]
        await self._is_over.wait()
        for task in self._tasks[1:]:
            task.cancel()
        if not self.failures:
            await self._end()
        self.is_stopping = True
        for task in [running, *self._tasks]:
            task.cancel()
        await asyncio.gather(running, *self._tasks, return_exceptions=True)
        if not self.failures:
            await check_end(self)
            self.metrics.check_end()
            self.traces.check_end()
            scheduler = self.step_loop.scheduler
            assert scheduler is not None
            load = scheduler.load()
            self.events["preemptions"] += load.num_preemptions
            self.events["prefix hits"] += load.num_cached_prompt_tokens
            self.events["overshoots"] += load.num_overshoot_tokens

    async def _end(self) -> None:
        """Ends the world as the scheduler service does when it stops."""
        draining = asyncio.create_task(self.hub.drain())
        await asyncio.sleep(0)
        late = [self.start_call() for _ in range(3)]
        self.is_cut_short = self.rng.random() < 0.3
        await asyncio.wait([draining], timeout=1.0 if self.is_cut_short else 3600.0)
        if not draining.done():
            if not self.is_cut_short:
                self.fail("the drain does not end")
            draining.cancel()
            self.hub.end_all(WorkerUnavailable("the server is stopping"))
        elif self.hub._num_open:
            self.fail("drained, with open requests")
        self.servicer.close()
        for front_end in self.front_ends:
            await front_end.leave()
        calls = [*late, *(call for front_end in self.front_ends for call in front_end.calls)]
        _, pending = await asyncio.wait(calls, timeout=60.0)
        if pending:
            self.fail(f"{len(pending)} calls never end")
        await asyncio.sleep(10.0)

    async def _start_front_end(self, kind: type[SimulatedFrontEnd]) -> SimulatedFrontEnd:
        front_end = kind(TOKENIZER, self.rng, self.events)
        await front_end.start(self.hub, self.servicer)
        return front_end

    async def replace_front_end(self) -> SimulatedFrontEnd:
        """Starts another front end in the place of one, and returns the one that is to go."""
        index = self.rng.randrange(len(self.front_ends))
        self.lost_front_ends.append(self.front_ends[index])
        self.front_ends[index] = await self._start_front_end(type(self.front_ends[index]))
        return self.lost_front_ends[-1]

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.servicer.say_alive()

    async def _break_things(self) -> None:
        pause_s = self.rng.choice([0.3, 1.0, 5.0])
        names = list(FAULTS)
        weights = [weight for weight, _ in FAULTS.values()]
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / pause_s))
            [name] = self.rng.choices(names, weights)
            if await FAULTS[name][1](self):
                self.count(name)
            check_books(self)
            self.metrics.check()
            self._watch_progress()
            if now() > LIMIT_S:
                self.fail(f"only {self.num_steps} steps in all that time")

    def _watch_progress(self) -> None:
        session, scheduler = self.worker.sound_session, self.step_loop.scheduler
        if session is None or scheduler is None or not scheduler.num_unfinished:
            return
        if now() - max(session.heard_at, self.sink.idle_at) > STUCK_S:
            self.fail(f"no step for {STUCK_S} s, though sequences are live")

    # Clients

    async def _ask_on(self, think_s: float) -> None:
        while True:
            num_answers = self.events["answers"]
            await asyncio.wait([self.start_call()])
            pause_s = think_s if self.events["answers"] > num_answers else 3.0
            await asyncio.sleep(self.rng.expovariate(1 / pause_s) if pause_s else 0.0)

    def start_call(self) -> "asyncio.Task[None]":
        front_end = self.rng.choice(self.front_ends)
        serial = len(self.calls) + 1
        is_duplicate = self.rng.random() < 0.02 and bool(self.calls)
        if is_duplicate:
            self.calls[-1].may_share_id = True
        request_id = self.calls[-1].asked.message.request_id if is_duplicate else f"request-{serial}"
        asked = make_request(self.rng, serial, request_id, self.worker.info, TOKENIZER)
        deadline = now() + self.rng.choice(TIMEOUTS_S) if self.rng.random() < 0.2 else None
        call = Call(asked, TOKENIZER, front_end, may_share_id=is_duplicate, deadline=deadline)
        self.calls.append(call)
        call.task = asyncio.create_task(self._call(call))
        front_end.calls.append(call.task)
        call.task.add_done_callback(front_end.calls.remove)
        if deadline is not None:
            # gRPC may end the call late.
            cutting = self._loop.call_at(deadline + self.rng.choice([0.0, 0.5]), call.task.cancel)
            call.task.add_done_callback(lambda _: cutting.cancel())
        return call.task

    async def _call(self, call: Call) -> None:
        rng, servicer = self.rng, call.front_end.servicer
        is_slow = rng.random() < 0.1

        async def pause() -> None:
            if is_slow:
                await asyncio.sleep(rng.choice([0.0, 0.05, 1.0]))

        try:
            if rng.random() < 0.1:
                await call.ask(servicer)
            else:
                await call.stream(servicer, pause)
        except asyncio.CancelledError:
            self._check(call, None)
        except (TandemError, WrongAnswer) as error:
            self._check(call, error)
        except Exception as error:
            self.fail(f"request {call.asked.serial} ended with {error!r}")
        else:
            self.count("answers")
            self.events += call.features
            if call.asked.flaw is not None and not call.is_aborted:
                self.fail(f"request {call.asked.serial} has its answer, though it is {call.asked.flaw}")
        call.is_ended = True

    def _check(self, call: Call, error: Exception | None) -> None:
        try:
            if isinstance(error, WrongAnswer):
                raise error
            call.check_beginning()
            if error is not None:
                check_error(self, call, error)
        except WrongAnswer as wrong:
            self.fail(f"request {call.asked.serial}: {wrong}")


class _WatchedLoop(StepLoop):
    """Counts stops that come when the core has already ended the sequence, and checks that nothing starts late."""

    world: World

    def submit(self, requests: Sequence[SequenceRequest]) -> None:
        if self.scheduler is not None and not self.scheduler.num_unfinished:
            self.world.sink.idle_at = now()
        super().submit(requests)

    def discount(self, num_output_tokens: int) -> None:
        self.world.count("stop string found after the end")
        super().discount(num_output_tokens)

    def _next_plan(self) -> StepPlan | None:
        plan = super()._next_plan()
        for new in plan.added_rows if plan is not None else ():
            call = self.world.calls[new.sampling.seed - 1]
            if new.sequence_id == PROBE_ID:
                continue
            self.world.planned[new.sequence_id] = new.num_prompt_tokens
            if call.deadline is not None and call.deadline <= now():
                self.world.fail(f"request {call.asked.serial} starts after its deadline, {call.deadline:.3f} s")
        return plan


def random_worker(rng: Random) -> WorkerInfo:
    return worker_info(vocab_size=VOCAB_SIZE, **random_size(rng))


def random_config(rng: Random) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=rng.randint(2, 8),
        max_num_batched_tokens=rng.choice([8, 12, 64]),
        max_chunk_tokens=rng.choice([None, None, 1, 3, 8]),
        max_plans_in_flight=rng.randint(1, 4),
        max_num_waiting=rng.choice([6, 100]),
        max_num_waiting_tokens=rng.choice([100, 2**22]),
        enable_prefix_caching=rng.random() < 0.8,
        admission_watermark=rng.choice([0.0, 0.01, 0.2]),
    )
