"""A worker in virtual time, with faults. The fake worker executes its plans, and fails loudly if one is wrong. Knows
the step loop's interface to a worker, and what the world says of each sequence.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any, Protocol

from tandem_scheduler.core.suspects import PROBE_ID
from tandem_shared.errors import SessionTaken, TandemError, WorkerFailed, WorkerUnavailable
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import (
    FAULT_GRAMMAR,
    FAULT_NAN_LOGITS,
    FAULT_NO_TOKEN,
    RowLogprobs,
    StepPlan,
    StepResult,
    WorkerInfo,
)
from tests.support.builders import prompt_logprobs
from tests.support.fake_worker import BrokenPlan, FakeRunner

MISFITS: tuple[Callable[[StepResult], StepResult], ...] = (
    lambda result: dataclasses.replace(result, step_id=result.step_id + 1),
    lambda result: dataclasses.replace(result, num_token_ids=[*result.num_token_ids, 1]),
    lambda result: dataclasses.replace(result, token_ids=[*result.token_ids, 0]),
    lambda result: dataclasses.replace(result, num_token_ids=[2], token_ids=[0, 0]),
    lambda result: dataclasses.replace(result, logprobs=(RowLogprobs(10_000, -1.0),)),
    lambda result: dataclasses.replace(
        result, prompt_logprobs=(*result.prompt_logprobs, prompt_logprobs(0, 10_000, (-1.0,), (1,)))
    ),
)
"""Make results that fit no plan."""

ROW_FAULT, GRAMMAR_FAULT, NO_TOKEN = "row fault", "grammar that fails", "no token left"
LAST_WORD, VANISHES, HANGS = "poisonous, last word", "poisonous, vanishes", "poisonous, hangs"
MISFIT = "result that does not fit"
ROW_FAULTS = {ROW_FAULT: FAULT_NAN_LOGITS, GRAMMAR_FAULT: FAULT_GRAMMAR, NO_TOKEN: FAULT_NO_TOKEN}
"""The flaws that end their own sequence, and no other, with the codes of their faults."""
FLAWS = (*ROW_FAULTS, LAST_WORD, VANISHES, HANGS)


@dataclasses.dataclass(frozen=True)
class Flaw:
    """What is wrong with a sequence: one of FLAWS, which shows each time that the sequence is computed with `length` or
    more tokens.
    """

    kind: str
    length: int


class World(Protocol):
    """What the worker asks of the world and tells it."""

    rng: Random
    step_timeout_s: float
    is_stopping: bool
    """Whether the step loop was told to end."""

    def fail(self, what: str) -> None:
        """Notes a broken promise."""

    def count(self, event: str) -> None: ...

    def admit(self, sequence_id: int, sampling: RowSampling) -> tuple[str, Flaw | None]:
        """The cache salt of a sequence that enters the batch, and what is wrong with it."""


class SimulatedWorker:
    """A WorkerClient, whose worker goes and comes when the world says so."""

    address = "simulated:1"

    def __init__(self, world: World, info: WorkerInfo) -> None:
        self.info = info
        self.is_up = True
        self.up_since = 0.0
        self.session: SimulatedSession | None = None
        self.refusals = 0
        """The number of next sessions to refuse, as if another scheduler had the worker."""
        self.num_sampled = 0
        """The number of tokens in results that the step loop took."""
        self._world = world
        self._last_epoch = 0

    @property
    def sound_session(self) -> "SimulatedSession | None":
        return self.session if self.session is not None and not self.session.loss else None

    def go_away(self, seconds: float, **changes: object) -> None:
        """Goes away for `seconds`, and comes back with `changes` of its info."""
        self.is_up = False

        def come_back() -> None:
            self.is_up = True
            self.up_since = now()
            self.info = dataclasses.replace(self.info, worker_instance_id=f"worker at {now()}", **changes)  # type: ignore[arg-type]

        asyncio.get_running_loop().call_later(seconds, come_back)

    async def get_info(self, timeout_s: float) -> WorkerInfo:
        if not self.is_up:
            await asyncio.sleep(self._world.rng.choice([0.001, timeout_s]))
            raise WorkerUnavailable("nobody answers")
        return self.info

    async def open_session(
        self, info: WorkerInfo, scheduler_id: str, epoch: int, num_live_sequences: int
    ) -> "SimulatedSession":
        await asyncio.sleep(self._world.rng.choice([0.0, 0.0, 0.01, 0.3]))
        if not self.is_up or info != self.info:
            raise WorkerUnavailable("the worker is another one now")
        if epoch <= self._last_epoch:
            self._world.fail(f"epoch {epoch} comes after {self._last_epoch}")
        self._last_epoch = epoch
        if self.session is not None:
            self._world.fail("a session is opened while the last one is open")
        if self.refusals:
            self.refusals -= 1
            self._world.count("session refused")
            raise SessionTaken("another scheduler has the worker")
        self.session = SimulatedSession(self._world, self, info)
        return self.session

    async def close(self) -> None:
        pass


@dataclasses.dataclass
class _Step:
    """A plan that was sent. flaw: the kind of flaw with which it takes the worker down; empty for none. faulty: the
    sequences of which the result says that their KV is wrong.
    """

    result: StepResult
    flaw: str = ""
    faulty: tuple[int, ...] = ()


class SimulatedSession:
    """A session whose steps run one after the other, until a fault ends it or the step loop closes it."""

    def __init__(self, world: World, worker: SimulatedWorker, info: WorkerInfo) -> None:
        self.info = info
        self.heard_at = now()
        self.loss = ""
        """The fault that ends the session; empty while it is sound."""
        self.is_misfit_due = False
        self.next_step_s = 0.0
        """The time that the next step takes; 0 for a random short one."""
        self._world = world
        self._worker = worker
        self._runner = FakeRunner(info, salt_of=lambda sequence_id: self._salts[sequence_id])
        self._salts: dict[int, str] = {}
        self._flaws: dict[int, Flaw] = {}
        # Sequences whose KV the scheduler knows to be wrong.
        self._faulty: set[int] = set()
        self._steps: deque[_Step] = deque()
        self._error: TandemError | None = None
        self._may_finish_steps = False
        self._hung_at: float | None = None
        self._is_used = self._is_hanging = self._is_closed = False
        self._waking = asyncio.Event()

    # The interface to the step loop

    async def send(self, plan: StepPlan) -> int:
        if self._world.rng.random() < 0.2:
            await asyncio.sleep(self._world.rng.choice([0.0, 0.001, 0.03]))
        if self._error is not None or self._is_closed:
            raise WorkerUnavailable("broken pipe")
        try:
            self._steps.append(self._execute(plan))
        except BrokenPlan as error:
            self._world.fail(f"a plan that breaks the rules: {error}")
            raise
        self._waking.set()
        return 0

    async def results(self) -> AsyncIterator[StepResult]:
        self._is_used = True
        while True:
            while not self._steps and not self._must_end:
                self._waking.clear()
                await self._waking.wait()
            if not self._must_end:
                await self._compute(self._steps[0].flaw)
            if self._must_end:
                raise self._error or WorkerUnavailable("closed")
            if self.loss == MISFIT:
                self._world.fail("a result that does not fit its plan was taken")
            step = self._steps.popleft()
            result = step.result
            if self.is_misfit_due and not self.loss:
                self.loss = MISFIT
                self._world.count(MISFIT)
                result = self._world.rng.choice(MISFITS)(result)
            else:
                self._worker.num_sampled += len(result.token_ids)
                self._faulty.update(step.faulty)
            self.heard_at = now()
            yield result

    async def close(self) -> None:
        if self._is_used and not self.loss and not self._world.is_stopping:
            self._world.fail("the step loop gave up a sound worker")
        if self._hung_at is not None and now() - self._hung_at > 1.1 * self._world.step_timeout_s + 1:
            self._world.fail(f"a worker that hung was kept for {now() - self._hung_at:.1f} s")
        if self._is_hanging:
            self._world.count("worker hangs")
        self._is_closed = True
        self._waking.set()
        for _ in range(self._runner.num_full_hits):
            self._world.count("full hits")
        if self._worker.session is self:
            self._worker.session = None

    # Faults

    def lose(self, loss: str, error: TandemError, *, may_finish_steps: bool = False) -> None:
        """Ends the session with this error. may_finish_steps: the steps under way still give results, though no more
        plans are taken.
        """
        self.loss, self._error, self._may_finish_steps = loss, error, may_finish_steps
        if self._steps:
            self._world.count("plans refused, then results" if may_finish_steps else "results lost")
        self._waking.set()

    def hang(self, loss: str = "hangs") -> None:
        """Brings no more results and no error."""
        self.loss, self._is_hanging = loss, True
        self._hung_at = now() if self._steps else None

    @property
    def _must_end(self) -> bool:
        if self._error is not None:
            return not (self._may_finish_steps and self._steps)
        return self._is_closed

    async def _compute(self, flaw: str) -> None:
        """Takes the time of a step; a flaw ends the session."""
        step_s, self.next_step_s = self.next_step_s or self._world.rng.choice([0.003, 0.01, 0.01, 0.03]), 0.0
        end = now() + step_s
        while not self._must_end and (now() < end or self._is_hanging):
            if self._is_hanging:
                self._hung_at = self._hung_at or now()
                self._waking.clear()
                await self._waking.wait()
            else:
                await self._wait(min(end - now(), 1.0))
                # A step that makes progress reports it.
                self.heard_at = now()
        if step_s > self._world.step_timeout_s and not self._must_end:
            self._world.count("long step that gets on")
        if flaw and self.loss:
            # The session was lost already, and ends now.
            self._may_finish_steps = False
        elif flaw:
            self._world.count(flaw)
            if flaw == HANGS:
                self.hang(flaw)
                await self._compute("")
            else:
                self.lose(flaw, WorkerFailed("a step failed") if flaw == LAST_WORD else WorkerUnavailable("reset"))
                self._worker.go_away(self._world.rng.choice([0.05, 0.5]))

    async def _wait(self, seconds: float) -> None:
        """Waits for this time, or until the session ends."""
        self._waking.clear()
        timer = asyncio.get_running_loop().call_later(seconds, self._waking.set)
        await self._waking.wait()
        timer.cancel()

    def _execute(self, plan: StepPlan) -> _Step:
        self._spoil_what_is_removed(plan)
        for new in plan.added_rows:
            if new.sequence_id == PROBE_ID:
                self._salts[PROBE_ID] = ""
                continue
            self._salts[new.sequence_id], flaw = self._world.admit(new.sequence_id, new.sampling)
            if flaw is not None:
                self._flaws[new.sequence_id] = flaw
        if not self._flaws:
            return _Step(self._runner.execute(plan).wait())
        lengths = {row.sequence_id: len(row.chain) for row in self._runner.rows.values()}
        lengths |= {new.sequence_id: len(new.token_ids) for new in plan.added_rows}
        showing = {key for key, flaw in self._flaws.items() if lengths.get(key, 0) >= flaw.length}
        self._runner.fault_codes = {
            key: ROW_FAULTS[self._flaws[key].kind] for key in showing if self._flaws[key].kind in ROW_FAULTS
        }
        self._runner.faulty = set(self._runner.fault_codes)
        result = self._runner.execute(plan).wait()
        faulty = tuple(self._runner.rows[fault.row].sequence_id for fault in result.faults)
        for sequence_id in faulty:
            self._world.count(self._flaws[sequence_id].kind)
        faulty = tuple(sequence_id for sequence_id in faulty if self._flaws[sequence_id].kind == ROW_FAULT)
        chunk_rows = set(plan.chunk_rows.tolist())
        computed = [
            state.sequence_id for row, state in self._runner.rows.items() if state.is_decoding or row in chunk_rows
        ]
        kinds = [self._flaws[key].kind for key in computed if key in showing]
        deadly = [kind for kind in kinds if kind not in ROW_FAULTS]
        return _Step(result, deadly[0] if deadly else "", faulty)

    def _spoil_what_is_removed(self, plan: StepPlan) -> None:
        """Marks blocks as unreadable that a removed faulty row wrote, as they may be wrong. Rows that read them before
        the fault was known may go on.
        """
        removed = {row: self._runner.rows[row] for row in plan.removed_rows.tolist() if row in self._runner.rows}
        spoilt = {block for state in removed.values() if state.sequence_id in self._faulty for block in state.block_ids}
        for state in self._runner.rows.values() if spoilt else ():
            if state.sequence_id not in self._faulty:
                spoilt.difference_update(state.block_ids)
        for block in spoilt:
            self._runner.forget_block(block)


def now() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


def random_size(rng: Random) -> dict[str, Any]:
    """Random sizes for WorkerInfo: from pools that hold one sequence to pools that hold all."""
    block_size = rng.choice([1, 4, 16])
    return {
        "max_model_len": rng.choice([50, 90, 90]),
        "block_size": block_size,
        "num_blocks": rng.choice([48, 64, 96, 160, 512]) // block_size + 1,
        "max_num_rows": rng.randint(2, 8),
        "max_num_batched_tokens": rng.choice([8, 16, 64]),
    }
