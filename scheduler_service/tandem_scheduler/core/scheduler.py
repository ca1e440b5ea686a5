"""The scheduler: events in, step plans out. Pure and deterministic: equal calls give equal plans. It knows nothing of
text, clients or the wire, and has no clock.

Theory of operation
-------------------
There is no prefill phase and no decode phase. A sequence is a list of known tokens, prompt and output, and in each step
its computed tokens (those whose KV exists) catch up with the known ones. A step has one token budget: first each
decoding row computes its one missing token, then prompts under way compute a chunk each, then waiting sequences are
admitted. After a preemption, prompt and output are simply a longer prompt.

schedule() makes a plan and update() takes its result. schedule() may run again before update(), so up to
max_plans_in_flight steps are planned ahead, each as if those before it gave every decoding row its token. The token
itself stays on the worker, as the row's next input. A row therefore has two lengths: scheduled (Rows.next_position) and
confirmed (Sequence.token_ids).

How many tokens come is known at planning, so a sequence that ends by length leaves its row with the plan of its last
token, and is DRAINING until the results are in. Which tokens come is not known: a sequence that ends by a stop token or
from outside may already be in later plans, and what they compute past the end is dropped as overshoot. A result finds
its sequences by the list that was made with its plan, as a row may have another owner by then.

Blocks are freed in one place, Residency.vacate(), and at once, even if steps in flight still write them: plans run in
order, so whoever gets a block writes it later. Where a decoding row finds no block, the last sequence in order, which
may be that row's own, goes back to the queue with all of its tokens. The first in order never does, so there is always
progress: a sequence that does not fit the pool alone is refused when it comes.

check_integrity() states the invariants: each row and each block reference has one owner, a sequence is where its state
says, and free, cached and used blocks add up.
"""

from array import array
from dataclasses import asdict

import numpy as np

from tandem_scheduler.core.admission import Admission
from tandem_scheduler.core.integrity import check_integrity
from tandem_scheduler.core.logprob_reports import reports_by_sequence, take_reports
from tandem_scheduler.core.plan_builder import PlanBuilder
from tandem_scheduler.core.residency import Residency
from tandem_scheduler.core.row_faults import REQUEST_FAULTS, fault_of
from tandem_scheduler.core.sequence import Sequence, SequenceState
from tandem_scheduler.core.steps_in_flight import StepsInFlight
from tandem_scheduler.core.suspects import PROBE_ID, Suspects
from tandem_scheduler.core.types import (
    Counters,
    FinishedSequence,
    FinishReason,
    Load,
    SchedulerConfig,
    SequenceRequest,
    StepOutputs,
)
from tandem_scheduler.core.waiting_queue import WaitingQueue
from tandem_shared.errors import FieldViolation, InvalidRequest, RequestIdInUse
from tandem_shared.step_plan import Int32Array, StepPlan, StepResult, WorkerInfo


class Scheduler:
    """One scheduler for one worker. schedule() and update() drive everything."""

    def __init__(self, config: SchedulerConfig, worker: WorkerInfo) -> None:
        self.config = config
        self.counters = Counters()
        self.num_decoding_rows = 0
        """How many rows the newest plan decodes. A plan does not say so, as decoding rows are not listed in it."""
        self._live: dict[int, Sequence] = {}
        self._num_arrivals = 0
        self._is_attached = True
        self._queue = WaitingQueue(config.max_num_waiting, config.max_num_waiting_tokens)
        self._suspects = Suspects(config.max_plans_in_flight)
        self._admission = Admission(self._queue, self._suspects, self.counters, config.admission_watermark)
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
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self._live[sequence.sequence_id] = sequence
            self._queue.push_new(sequence, len(self._live))

    def abort(self, sequence_id: int) -> FinishedSequence | None:
        """Ends a sequence; its blocks are free at once. None if it is not live."""
        sequence = self._live.get(sequence_id)
        return None if sequence is None else self._finish(sequence, FinishReason.ABORT)

    def stop(self, sequence_id: int, num_output_tokens: int) -> FinishedSequence | None:
        """Ends a sequence at a stop that the front end found in its text. Tokens past it are overshoot. None if the
        sequence is not live.
        """
        sequence = self._live.get(sequence_id)
        if sequence is None:
            return None
        self.discount(max(0, sequence.num_output_tokens - num_output_tokens))
        return self._finish(sequence, FinishReason.STOP)

    def expire(self, now: float) -> list[FinishedSequence]:
        """Ends the waiting sequences whose deadlines have passed, so that no later plan starts them."""
        return [self._finish(sequence, FinishReason.EXPIRED) for sequence in self._queue.expired(now)]

    def discount(self, num_tokens: int) -> None:
        """Counts output tokens that turned out to be past a stop as overshoot. Changes no plan."""
        self.counters.num_output_tokens -= num_tokens
        self.counters.num_overshoot_tokens += num_tokens

    def reset_prefix_cache(self) -> int:
        """Forgets cached blocks that no sequence uses. Returns how many there were."""
        return self._residency.blocks.reset_cache()

    def lose_worker(self, failure: str = "") -> list[FinishedSequence]:
        """Everything that the worker held is gone: preempts all sequences, forgets the prefix cache, retries no step.

        failure is what the worker said of the step that failed, empty if it vanished. Returns the sequences that end
        here because they take workers down.
        """
        self._is_attached = False
        self.counters.num_worker_losses += 1
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
        """Begins a session with an empty worker. Returns the sequences that end here because they don't fit it."""
        if self._is_attached:
            raise ValueError("a worker is attached")
        self._is_attached = True
        self._start_session(worker)
        ended = []
        for sequence in list(self._live.values()):
            # The new worker's blocks may have another size.
            sequence.block_keys.clear()
            if problem := self._residency.why_never_fits(sequence):
                ended.append(self._finish(sequence, FinishReason.ERROR, error=problem))
        return ended

    # Steps

    def schedule(self, max_prompt_tokens: int | None = None) -> StepPlan | None:
        """Plans the next step. None if there is nothing to compute, enough plans are in flight, or no worker is
        attached.

        max_prompt_tokens limits the step's prompt tokens further than the token budget does, for a worker on which a
        step of the whole budget takes too long.
        """
        if not self._is_attached or len(self._in_flight) >= self.config.max_plans_in_flight:
            return None
        plan = PlanBuilder(self._residency, self._max_num_batched_tokens, self.config.max_chunk_tokens)
        self._grow_decoding_rows(plan)
        decoding = self._residency.rows.decoding()
        plan.budget -= len(decoding)
        if max_prompt_tokens is not None:
            plan.budget = min(plan.budget, max_prompt_tokens)
        for sequence in self._residency.prefilling:
            if plan.budget > 0:
                plan.add_chunk(sequence)
        self._admission.admit(plan, self._residency, self._held)
        if not len(decoding) and not plan.chunks:
            assert not plan.preempted, "the first sequence in order keeps its row, and every plan computes it"
            return None
        step_plan = self._close(plan, decoding)
        self._advance(plan, decoding)
        return step_plan

    def update(self, result: StepResult) -> StepOutputs:
        """Takes a step's result. Results come in the order of the plans and fit them; ProtocolError if not."""
        step = self._in_flight.pop(result)
        self._suspects.has_result = True
        outputs = StepOutputs(step.step_id, prompt_logprobs=take_reports(step.prompt_spans, result.prompt_logprobs))
        faults = {fault.row: fault.code for fault in result.faults}
        owners = dict(zip(step.rows, step.sequences, strict=True)) if faults or result.logprobs else {}
        for row, code in faults.items():
            sequence = owners.pop(row)
            if code not in REQUEST_FAULTS:
                self._residency.distrust(sequence)
            if not sequence.is_finished:
                outputs.finished.append(self._finish(sequence, FinishReason.ERROR, None, *fault_of(code, sequence)))
        self._confirm(list(owners.values()) if faults else step.sequences, result.token_ids, outputs)
        if result.logprobs:
            outputs.logprobs = reports_by_sequence(owners, result.logprobs, outputs.sequence_ids)
        return outputs

    # Questions

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    def longest_prefix(self, token_ids: Int32Array, cache_salt: str = "") -> int:
        """How many tokens at the start of token_ids, of shape (n,), have their KV in the prefix cache."""
        return self._residency.blocks.longest_prefix(array("i", token_ids.tolist()), cache_salt)

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
            **asdict(self.counters),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError where the books don't balance."""
        check_integrity(self._live.values(), self._queue.entries, self._residency, self._in_flight)
        new = [sequence.num_prompt_tokens for sequence in self._live.values() if sequence.num_cached_tokens is None]
        assert (self._queue.num_new, self._queue.num_new_tokens) == (len(new), sum(new)), "new sequences are miscounted"

    # The parts of a step

    def _grow_decoding_rows(self, plan: PlanBuilder) -> None:
        """Gives each decoding row a block for its next position, preempting the last in order where none is left."""
        residency, rows = self._residency, self._residency.rows
        full = np.flatnonzero(rows.is_decoding & (rows.next_position >= rows.capacity))
        # The rows are taken in order, so that a preempted sequence never had a block appended in this very plan.
        for sequence in sorted(map(rows.owner, full.tolist()), key=lambda sequence: sequence.order):
            while sequence.state is SequenceState.RUNNING and residency.blocks.num_available == 0:
                victim = max(rows.running(), key=lambda running: running.order)
                self._preempt(victim)
                plan.preempted.append(victim)
            if sequence.state is SequenceState.RUNNING:
                plan.appended_rows.append(sequence.row)
                plan.appended_ids.append(residency.grow(sequence))

    def _close(self, plan: PlanBuilder, decoding: Int32Array) -> StepPlan:
        """Numbers the plan and notes the sequences whose results it will bring."""
        rows = decoding.tolist()
        if plan.completed:
            rows = sorted(rows + [sequence.row for sequence in plan.completed])
        step_id = self._in_flight.push(rows, list(map(self._residency.rows.owner, rows)), plan.prompt_spans)
        self.counters.num_steps += 1
        self.num_decoding_rows = len(decoding)
        return plan.build(step_id)

    def _advance(self, plan: PlanBuilder, decoding: Int32Array) -> None:
        """Moves every row past what the plan computes. Ends by length are known here, before any result."""
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
                # The probe is not a request's sequence, so its token has no receiver.
                sequence.move_to(SequenceState.FINISHED)

    # Moves

    def _confirm(self, sequences: list[Sequence], token_ids: list[int], outputs: StepOutputs) -> None:
        """Appends a step's tokens to the sequences that are still live. All other tokens are overshoot."""
        residency = self._residency
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            state = sequence.state
            if state is SequenceState.FINISHED:
                self.counters.num_overshoot_tokens += 1
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
        self.counters.num_output_tokens += len(outputs.token_ids)

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
        """The sequences that the worker holds: they run, or have ended and are still in a step in flight."""
        return self._in_flight.sequences().union(self._residency.rows.running())

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence back to wait with all its tokens; it will be computed again."""
        self.counters.num_preemptions += 1
        sequence.num_outstanding = self._in_flight.count(sequence)
        sequence.move_to(SequenceState.WAITING)
        self._residency.vacate(sequence)
        self._queue.push(sequence, len(self._live))

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_token_id: int | None = None,
        error: str | None = None,
        error_field: str | None = None,
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
            error_field=error_field,
        )

    def _start_session(self, worker: WorkerInfo) -> None:
        """Begins with an empty worker: its limits, all rows and blocks free, step ids from 1."""
        config = self.config
        self._max_num_batched_tokens = min(config.max_num_batched_tokens, worker.max_num_batched_tokens)
        num_rows = min(config.max_num_seqs, worker.max_num_rows, self._max_num_batched_tokens)
        self._residency = Residency(worker, num_rows, enable_prefix_caching=config.enable_prefix_caching)
        self._in_flight = StepsInFlight()
        self._suspects.start_session()
