"""The scheduler: events in, step plans out. Pure and deterministic: equal calls give equal plans.

There is no prefill phase and no decode phase: each sequence's computed tokens catch up with its length, and
each step shares one token budget, decoding rows first. schedule() may run again before update(): a sequence
has scheduled tokens (in plans) and confirmed ones (in results). Knows nothing of text, clients
or the wire, and has no clock.
"""

import math
from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np

from tandem_scheduler.core.integrity import check_integrity
from tandem_scheduler.core.plan_builder import PlanBuilder
from tandem_scheduler.core.residency import Residency
from tandem_scheduler.core.sequence import Sequence, SequenceState
from tandem_scheduler.core.suspects import PROBE_ID, Suspects, create_probe
from tandem_scheduler.core.types import (
    FinishedSequence,
    FinishReason,
    Load,
    SchedulerConfig,
    SequenceRequest,
    StepOutputs,
)
from tandem_scheduler.core.waiting_queue import WaitingQueue
from tandem_shared.errors import FieldViolation, InvalidRequest, ProtocolError, RequestIdInUse
from tandem_shared.step_plan import Int32Array, StepPlan, StepResult, WorkerInfo


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """Whose results a plan will bring, rows ascending: never looked up through the rows' present owners."""

    step_id: int
    rows: list[int]
    sequences: list[Sequence]


class Scheduler:
    """One scheduler for one worker. schedule() and update() drive everything."""

    def __init__(self, config: SchedulerConfig, worker: WorkerInfo) -> None:
        self.config = config
        self._live: dict[int, Sequence] = {}
        # The time that expire() was told last.
        self._now = -math.inf
        self._queue = WaitingQueue(config.max_num_waiting, config.max_num_waiting_tokens)
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_losses = 0
        self._num_prompt_tokens = 0
        self._num_cached_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_overshoot_tokens = 0
        self._is_attached = True
        self._suspects = Suspects(config.max_plans_in_flight)
        self._start_session(worker)

    # Events

    def add(self, *requests: SequenceRequest) -> None:
        """Queues the sequences of a request, all or none. Raises RequestIdInUse, InvalidRequest (it can never fit) or
        QueueFull.
        """
        sequences = [self._checked(request, number) for number, request in enumerate(requests, self._num_arrivals)]
        self._queue.refuse_if_full(sequences)
        for sequence in sequences:
            self._num_arrivals += 1
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._live[sequence.sequence_id] = sequence
            self._queue.push_new(sequence, len(self._live))

    def abort(self, sequence_id: int) -> FinishedSequence | None:
        """Ends a sequence; its blocks are free at once. None if it is not live."""
        sequence = self._live.get(sequence_id)
        return None if sequence is None else self._finish(sequence, FinishReason.ABORT)

    def stop(self, sequence_id: int, num_output_tokens: int) -> FinishedSequence | None:
        """Ends a sequence at a stop that the front end found in its text; what came after is overshoot. None if it
        is not live.
        """
        sequence = self._live.get(sequence_id)
        if sequence is None:
            return None
        self.discount(max(0, sequence.num_output_tokens - num_output_tokens))
        return self._finish(sequence, FinishReason.STOP)

    def expire(self, now: float) -> list[FinishedSequence]:
        """Ends the waiting sequences whose deadlines have passed, so that no later plan starts them."""
        self._now = now
        return [self._finish(sequence, FinishReason.EXPIRED) for sequence in self._queue.expired(now)]

    def discount(self, num_tokens: int) -> None:
        """Output tokens that turned out to be past a stop are overshoot. Changes no plan."""
        self._num_output_tokens -= num_tokens
        self._num_overshoot_tokens += num_tokens

    def reset_prefix_cache(self) -> int:
        """Forgets cached blocks that no sequence uses; gives their number."""
        return self._residency.blocks.reset_cache()

    def lose_worker(self, failure: str = "") -> list[FinishedSequence]:
        """Everything the worker held is gone: preempts all, forgets the prefix cache, never retries a step.

        failure is the worker's last word on the step that failed, empty where it vanished. Gives the sequences that end
        here, because they take workers down.
        """
        self._is_attached = False
        self._num_losses += 1
        held = sorted(self._held(), key=lambda sequence: sequence.arrival)
        present = [sequence for sequence in held if sequence.state is not SequenceState.FINISHED]
        tried = self._suspects.judge_loss(present)
        self._start_session(self._residency.worker)
        for sequence in present:
            if sequence.state is not SequenceState.WAITING:
                sequence.leave_row()
                sequence.move_to(SequenceState.WAITING)
                if sequence is tried:
                    sequence.arrival = self._num_arrivals
                    self._num_arrivals += 1
                self._queue.push(sequence, len(self._live))
        error = self._suspects.verdict(tried, failure) if tried is not None else None
        return [self._finish(tried, FinishReason.ERROR, error=error)] if tried is not None and error else []

    def attach_worker(self, worker: WorkerInfo) -> list[FinishedSequence]:
        """A new, empty worker. Gives the sequences that end here because they don't fit it."""
        if self._is_attached:
            raise ValueError("a worker is attached")
        self._is_attached = True
        self._start_session(worker)
        ended = []
        for sequence in list(self._live.values()):
            # The block size may be another.
            sequence.block_keys.clear()
            if problem := self._residency.why_never_fits(sequence):
                ended.append(self._finish(sequence, FinishReason.ERROR, error=problem))
        return ended

    # Steps

    def schedule(self, max_prompt_tokens: int | None = None) -> StepPlan | None:
        """The next step, or None: nothing to compute, enough plans in flight, or no worker.

        max_prompt_tokens limits the step's tokens of prompts further than the token budget does, for a worker on which
        a step of the whole budget takes too long.
        """
        if not self._is_attached or len(self._in_flight) >= self.config.max_plans_in_flight:
            return None
        plan = PlanBuilder(self._max_num_batched_tokens)
        self._grow_decoding_rows(plan)
        decoding = self._residency.rows.decoding()
        plan.budget -= len(decoding)
        if max_prompt_tokens is not None:
            plan.budget = min(plan.budget, max_prompt_tokens)
        for sequence in self._residency.prefilling:
            if plan.budget > 0:
                self._schedule_chunk(plan, sequence)
        self._admit(plan)
        if not len(decoding) and not plan.chunks:
            return None
        step_plan = self._close(plan, decoding)
        self._advance(plan, decoding)
        return step_plan

    def update(self, result: StepResult) -> StepOutputs:
        """Takes a step's result. Results come in the order of the plans and fit them; ProtocolError if not."""
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise ProtocolError(f"result of step {result.step_id}, which is not the oldest in flight")
        step = self._in_flight[0]
        faults = {fault.row: fault.code for fault in result.faults}
        expected = [int(row not in faults) for row in step.rows]
        if result.num_token_ids != expected or len(result.token_ids) != sum(expected):
            raise ProtocolError(f"result of step {result.step_id} does not fit its plan")
        if not {*faults, *(report.row for report in result.logprobs)} <= set(step.rows):
            raise ProtocolError(f"result of step {result.step_id} speaks of rows that did not sample")
        self._in_flight.popleft()
        self._suspects.has_result = True
        outputs = StepOutputs(step.step_id)
        owners = dict(zip(step.rows, step.sequences, strict=True)) if faults or result.logprobs else {}
        for row, code in faults.items():
            sequence = owners.pop(row)
            self._residency.distrust(sequence)
            if sequence.state is not SequenceState.FINISHED:
                error = f"the worker reports row fault {code}: the logits are not finite"
                outputs.finished.append(self._finish(sequence, FinishReason.ERROR, error=error))
        self._confirm(list(owners.values()) if faults else step.sequences, result.token_ids, outputs)
        if result.logprobs:
            confirmed = set(outputs.sequence_ids)
            # A row that asked and has a fault may be reported on: of no token, for a sequence that ended above.
            reports = {owners[report.row].sequence_id: report for report in result.logprobs if report.row in owners}
            outputs.logprobs = {key: report for key, report in reports.items() if key in confirmed}
        return outputs

    # Questions

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    def longest_prefix(self, token_ids: Int32Array, cache_salt: str = "") -> int:
        """Tokens at the start of token_ids whose KV is cached."""
        blocks = self._residency.blocks
        keys: list[int] = []
        tokens = array("i", token_ids.tolist())
        blocks.extend_keys(keys, tokens, cache_salt)
        return len(blocks.match(keys, tokens, cache_salt)) * blocks.block_size

    def load(self) -> Load:
        blocks = self._residency.blocks
        return Load(
            num_waiting_sequences=sum(s.state is SequenceState.WAITING for s in self._live.values()),
            num_running_sequences=self._residency.rows.num_used,
            num_total_blocks=blocks.num_total,
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_cached,
            num_used_blocks=blocks.num_used,
            block_size=blocks.block_size,
            num_steps_in_flight=len(self._in_flight),
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_worker_losses=self._num_losses,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_prompt_tokens=self._num_cached_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_overshoot_tokens=self._num_overshoot_tokens,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError where the books don't balance."""
        steps = [step.sequences for step in self._in_flight]
        check_integrity(self._live.values(), self._queue.entries, self._residency, steps)
        new = [sequence.num_prompt_tokens for sequence in self._live.values() if sequence.num_cached_tokens is None]
        assert (self._queue.num_new, self._queue.num_new_tokens) == (len(new), sum(new)), "new sequences are miscounted"

    # The parts of a step

    def _grow_decoding_rows(self, plan: PlanBuilder) -> None:
        """Gives each decoding row a block for its next position, preempting the last in order where none is left."""
        residency, rows = self._residency, self._residency.rows
        full = np.flatnonzero(rows.is_decoding & (rows.next_position >= rows.capacity))
        # In order, so that a victim never has a block appended in this very plan.
        for sequence in sorted(map(rows.owner, full.tolist()), key=lambda sequence: sequence.order):
            while sequence.state is SequenceState.RUNNING and residency.blocks.num_available == 0:
                self._preempt(max(rows.running(), key=lambda running: running.order))
            if sequence.state is SequenceState.RUNNING:
                plan.appended_rows.append(sequence.row)
                plan.appended_ids.append(residency.grow(sequence))

    def _admit(self, plan: PlanBuilder) -> None:
        """Admits waiting sequences, strictly in order: one that must wait is not overtaken."""
        while plan.budget > 0 and (sequence := self._queue.first()) is not None:
            if sequence.request.has_expired(self._now):
                # It was preempted for this very plan; expire() ends it before the next.
                return
            if self._suspects.needs_probe(sequence):
                self._probe(plan)
            if sequence.num_outstanding or not self._suspects.may_enter(sequence, self._held):
                return
            new_row = self._residency.try_enter(sequence, self.config.admission_watermark)
            if new_row is None:
                return
            self._queue.pop()
            if sequence.num_cached_tokens is None:
                self._queue.note_no_longer_new(sequence)
                sequence.num_cached_tokens = new_row.num_cached_tokens
                self._num_cached_prompt_tokens += new_row.num_cached_tokens
            self._suspects.note_admitted(sequence)
            plan.added.append(new_row)
            self._schedule_chunk(plan, sequence)

    def _probe(self, plan: PlanBuilder) -> None:
        """Adds a sequence of our own, whose result shows that the session can compute."""
        probe = create_probe()
        new_row = self._residency.try_enter(probe, 0.0)
        if new_row is not None:
            self._suspects.is_probed = True
            plan.added.append(new_row)
            self._schedule_chunk(plan, probe)

    def _schedule_chunk(self, plan: PlanBuilder, sequence: Sequence) -> None:
        num_left = len(sequence.token_ids) - sequence.num_computed_tokens
        num_tokens = min(num_left, plan.budget, self.config.max_chunk_tokens or num_left)
        plan.budget -= num_tokens
        plan.chunks[sequence.row] = num_tokens
        self._residency.compute(sequence, num_tokens)
        if num_tokens == num_left:
            plan.completed.append(sequence)

    def _close(self, plan: PlanBuilder, decoding: Int32Array) -> StepPlan:
        """Numbers the plan and notes whose results it will bring."""
        rows = decoding.tolist()
        if plan.completed:
            rows = sorted(rows + [sequence.row for sequence in plan.completed])
        sequences = list(map(self._residency.rows.owner, rows))
        self._in_flight.append(_StepInFlight(self._next_step_id, rows, sequences))
        step_plan = plan.build(self._next_step_id, self._residency.removed_rows)
        self._residency.removed_rows.clear()
        self._next_step_id += 1
        self._num_steps += 1
        return step_plan

    def _advance(self, plan: PlanBuilder, decoding: Int32Array) -> None:
        """Moves every row on, past the plan: ends by length are known now, before any result."""
        rows = self._residency.rows
        is_last = rows.next_position[decoding] == rows.last_position[decoding]
        drained = list(map(rows.owner, decoding[is_last].tolist()))
        self._residency.advance(decoding)
        for sequence in plan.completed:
            self._residency.start_decoding(sequence)
            if len(sequence.token_ids) + 1 == sequence.max_len:
                drained.append(sequence)
        for sequence in drained:
            sequence.move_to(SequenceState.DRAINING)
            self._residency.vacate(sequence)
            if sequence.sequence_id == PROBE_ID:
                # It was never live; nobody waits for its token.
                sequence.move_to(SequenceState.FINISHED)

    # Moves

    def _confirm(self, sequences: list[Sequence], token_ids: list[int], outputs: StepOutputs) -> None:
        """Appends a step's tokens to the sequences that are still live; the rest is overshoot."""
        residency = self._residency
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            state = sequence.state
            if state is SequenceState.FINISHED:
                self._num_overshoot_tokens += 1
                continue
            sequence.token_ids.append(token_id)
            outputs.sequence_ids.append(sequence.sequence_id)
            outputs.token_ids.append(token_id)
            if token_id in sequence.stop_token_ids:
                outputs.finished.append(self._finish(sequence, FinishReason.STOP, stop_token_id=token_id))
            elif state is SequenceState.RUNNING:
                residency.note_confirmed(sequence)
            elif state is SequenceState.WAITING:
                sequence.num_outstanding -= 1
            elif len(sequence.token_ids) == sequence.max_len:
                outputs.finished.append(self._finish(sequence, FinishReason.LENGTH))
        self._num_output_tokens += len(outputs.token_ids)

    def _checked(self, request: SequenceRequest, arrival: int) -> Sequence:
        if request.sequence_id in self._live:
            raise RequestIdInUse(f"sequence {request.sequence_id} is live")
        if len(request.prompt_token_ids) == 0:
            raise InvalidRequest(FieldViolation("prompt", "must hold at least one token"))
        if request.max_tokens < 1:
            raise InvalidRequest(FieldViolation("stopping.max_tokens", "must be at least 1"))
        sequence = Sequence(request, arrival)
        if problem := self._residency.why_never_fits(sequence):
            raise InvalidRequest(FieldViolation("prompt", problem))
        return sequence

    def _held(self) -> set[Sequence]:
        """By the worker: running, or ended and still in a step that is in flight."""
        in_flight = {sequence for step in self._in_flight for sequence in step.sequences}
        return in_flight.union(self._residency.rows.running())

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence back to wait with all its tokens; it will be computed again."""
        self._num_preemptions += 1
        sequence.num_outstanding = sum(sequence in step.sequences for step in self._in_flight)
        sequence.move_to(SequenceState.WAITING)
        self._residency.vacate(sequence)
        self._queue.push(sequence, len(self._live))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> FinishedSequence:
        if sequence.state is SequenceState.RUNNING:
            self._residency.vacate(sequence)
        if sequence.num_cached_tokens is None:
            self._queue.note_no_longer_new(sequence)
        sequence.move_to(SequenceState.FINISHED)
        del self._live[sequence.sequence_id]
        return FinishedSequence(
            sequence_id=sequence.sequence_id,
            reason=reason,
            num_output_tokens=sequence.num_output_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            stop_token_id=stop_token_id,
            error=error,
        )

    def _start_session(self, worker: WorkerInfo) -> None:
        """An empty worker: its limits, all its rows and blocks free, step ids from 1."""
        config = self.config
        self._max_num_batched_tokens = min(config.max_num_batched_tokens, worker.max_num_batched_tokens)
        num_rows = min(config.max_num_seqs, worker.max_num_rows, self._max_num_batched_tokens)
        self._residency = Residency(worker, num_rows, enable_prefix_caching=config.enable_prefix_caching)
        self._next_step_id = 1
        self._in_flight: deque[_StepInFlight] = deque()
        self._suspects.start_session()
