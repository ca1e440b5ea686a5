"""What must be true in a simulated world: after each step, for each error, for each log record, and at the end."""

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tandem_scheduler.core.types import FinishedSequence, StepOutputs
from tandem_scheduler.engine.hub import EngineHub
from tandem_shared.errors import (
    DeadlinePassed,
    Draining,
    InvalidRequest,
    ProtocolError,
    QueueFull,
    RequestIdInUse,
    SequenceFailed,
    WorkerUnavailable,
)
from tests.chaos.simulation.calls import Asked, Call
from tests.chaos.simulation.front_end import InjectedFault, RemoteFrontEnd
from tests.chaos.simulation.reports import PromptReports
from tests.chaos.simulation.truths import WrongAnswer
from tests.chaos.simulation.worker import GRAMMAR_FAULT, MISFIT, NO_TOKEN, ROW_FAULT, ROW_FAULTS, now

if TYPE_CHECKING:
    from tests.chaos.simulation.world import World

LAG_S = 30.0
"""How long a front end may still act on old news of the engine."""
GIVE_UP_SLACK_S = 9.0
"""Time for the pauses between tries to reach a worker, and for a try that hangs."""


class WatchedSink:
    """The step loop's sink: passes everything to the hub, and raises when the world says so, before or after the hub
    got the outputs.
    """

    def __init__(self, world: "World", hub: EngineHub) -> None:
        self.is_to_raise = self.is_to_raise_at_ends = self.has_raised = False
        self.gone_at: list[float] = []
        """When the step loop gave up waiting for a worker."""
        self.idle_at = 0.0
        """The last time at which no sequence was live."""
        self.num_tokens: Counter[int] = Counter()
        """The number of tokens that the core confirmed, by sequence."""
        self._prompt_reports = PromptReports(world)
        self._world = world
        self._hub = hub
        self.ready_at = self._lost_at = 0.0
        """When the last worker came, and when the last one was lost."""
        self._fingerprint = ""

    def on_outputs(self, outputs: StepOutputs) -> None:
        self.num_tokens.update(outputs.sequence_ids)
        self._prompt_reports.take(outputs)
        self._world.note_step()
        if self._must_raise(outputs):
            self.is_to_raise = False
            self.has_raised = True
            self._world.count("sink raises")
            if self._world.rng.random() < 0.5:
                self._hub.on_outputs(outputs)
            raise InjectedFault
        self._hub.on_outputs(outputs)
        check_books(self._world)

    def _must_raise(self, outputs: StepOutputs) -> bool:
        """Whether to raise now: if the world asked for it, and sometimes when sequences fail, which brings no token."""
        has_failed = any(end.error for end in outputs.finished)
        is_asked = self.is_to_raise and bool(outputs.sequence_ids)
        return is_asked or (has_failed and self._world.rng.random() < 0.2)

    def on_finished(self, finished: list[FinishedSequence]) -> None:
        if self.is_to_raise_at_ends and finished:
            self.is_to_raise_at_ends = False
            self.has_raised = True
            self._world.count("sink raises at ends")
            raise InjectedFault
        self._hub.on_finished(finished)
        check_books(self._world)

    def on_outputs_lost(self, sequence_ids: list[int], finished: list[FinishedSequence]) -> None:
        self._hub.on_outputs_lost(sequence_ids, finished)
        check_books(self._world)

    def on_worker_gone(self, error: WorkerUnavailable) -> None:
        self.gone_at.append(now())
        waited_s, limit_s = now() - self._lost_at, self._world.worker_wait_s
        if not limit_s - 0.001 <= waited_s <= limit_s + GIVE_UP_SLACK_S:
            self._world.fail(f"gave up the wait for a worker after {waited_s:.1f} s, not {limit_s:g} s")
        self._hub.on_worker_gone(error)
        check_books(self._world)

    async def on_readiness(self, is_ready: bool) -> None:
        step_loop = self._world.step_loop
        assert step_loop.worker is not None and step_loop.scheduler is not None
        if is_ready:
            self.ready_at = now()
            if self._fingerprint not in ("", step_loop.worker.fingerprint):
                if step_loop.scheduler.num_unfinished:
                    self._world.fail("what was live goes on with another model")
                # A front end that has not heard of it yet checks these against the model before.
                for _ in range(3):
                    self._world.start_call()
            self._fingerprint = step_loop.worker.fingerprint
        else:
            self._lost_at = now()
        await self._hub.on_readiness(is_ready)


def check_books(world: "World") -> None:
    """Checks that the books of core, hub and front ends agree. Takes time in proportion to all that they hold."""
    try:
        _check_books(world)
    except AssertionError as error:
        world.fail(f"the books don't balance: {error}")


def _check_books(world: "World") -> None:
    scheduler, hub = world.step_loop.scheduler, world.hub
    if scheduler is None:
        return
    scheduler.check_integrity()
    live = hub._sequences
    assert live.keys() == scheduler._live.keys(), "core and hub have other sequences"
    counted = Counter(sequence.request.request_id for sequence in live.values())
    assert counted == {key: request.num_live for key, request in hub._requests.items()}, "requests are miscounted"
    assert all(sequence.attachment in hub._attachments for sequence in live.values()), "of a front end that is gone"
    num_open = sum(len(attachment.requests) for attachment in hub._attachments)
    assert num_open == hub._num_open, f"{hub._num_open} requests are open, and of front ends {num_open}"
    assert hub._is_idle.is_set() == (not num_open), "idle, or not, with open requests"
    for attachment in hub._attachments:
        handles = {sequence.handle for request in attachment.requests.values() for sequence in request.sequences}
        assert attachment.sequences.keys() == handles, "sequences and requests of a front end differ"
        assert not attachment.pending, "news that nobody hands on"
    for front_end in world.front_ends:
        if (mirror := front_end.attachment) is not None:
            handles = {sequence.handle for sequence in live.values() if sequence.attachment is mirror}
            assert front_end.handles == handles, "hub and front end have other sequences"
            assert front_end.lives.keys() == mirror.requests.keys(), "hub and front end have other requests"
        for request in front_end.lives.values():
            held = sum(len(choice.token_ids) for choice in request.choices)
            assert request.num_unread_tokens == held, f"{held} tokens are unread, not {request.num_unread_tokens}"
    load = scheduler.load()
    assert load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks == load.num_total_blocks
    num_tokens = load.num_output_tokens + load.num_overshoot_tokens
    assert num_tokens == world.worker.num_sampled, f"{num_tokens} tokens of {world.worker.num_sampled}"
    if not live:
        world.sink.idle_at = now()


def check_error(world: "World", call: Call, error: Exception) -> None:
    """Raises WrongAnswer if no fault explains the error with which a call ended."""
    explanation = _explanation(world, call, error)
    if not explanation or (call.is_told_its_stop and explanation != "stopped"):
        raise WrongAnswer(f"ended with {type(error).__name__}: {error}")
    world.count(f"ended: {explanation}")


def _explanation(world: "World", call: Call, error: Exception) -> str:
    text, asked = str(error), call.asked
    match error:
        case Draining():
            return "draining" if world.hub.is_draining else ""
        case DeadlinePassed():
            return "deadline passed" if call.deadline is not None and call.deadline <= now() else ""
        case QueueFull():
            return "queue full" if _is_full(world, call) else ""
        case RequestIdInUse():
            return "id in use" if call.may_share_id else ""
        case InvalidRequest():
            return _explain_refusal(world, asked, text)
        case SequenceFailed():
            return _explain_failure(world, call, text)
        case WorkerUnavailable():
            return _explain_unavailable(world, call, text)
    return ""


def _explain_refusal(world: "World", asked: Asked, text: str) -> str:
    flaw = asked.flaw.kind if asked.flaw is not None else ""
    if "the grammar failed" in text:
        return flaw if flaw == GRAMMAR_FAULT else ""
    if "leave no token to choose" in text:
        return flaw if flaw == NO_TOKEN else ""
    return "too large" if _may_not_fit(world, asked) else ""


def _explain_failure(world: "World", call: Call, text: str) -> str:
    flaw = call.asked.flaw.kind if call.asked.flaw is not None else ""
    if "times while it computed this sequence apart" in text:
        return "poisonous" if flaw and flaw not in ROW_FAULTS else ""
    if "row fault" in text:
        return "row fault" if flaw == ROW_FAULT else ""
    if "more than the context" in text or "the KV pool has" in text:
        return "outgrown" if _may_not_fit(world, call.asked) else ""
    if "could not be taken by the front end" in text:
        return "listener raised" if call.front_end.has_raised else ""
    if "could not be handed on" in text:
        return "sink raised" if world.sink.has_raised else ""
    return ""


def _explain_unavailable(world: "World", call: Call, text: str) -> str:
    gone_at = world.sink.gone_at[-1] if world.sink.gone_at else -1.0
    if "no worker came back" in text:
        return "worker away" if gone_at >= call.started_at else ""
    if "the worker is gone" in text:
        is_back = world.step_loop.is_connected and now() - world.sink.ready_at > LAG_S
        return "refused without a worker" if gone_at >= 0 and not is_back else ""
    if "no worker has been seen yet" in text:
        return "refused before the first worker" if call.started_at < LAG_S else ""
    if "came to have another model" in text:
        return "checked against another model" if len({info.fingerprint for info in world.worker_infos}) > 1 else ""
    if "the scheduler process stands still" in text:
        front_end = call.front_end
        return "stalled" if isinstance(front_end, RemoteFrontEnd) and front_end.link.was_stalled(LAG_S) else ""
    if "the server is stopping" in text:
        is_late = world.hub.is_draining and not call.is_admitted
        return "stopped" if call.front_end.is_gone or world.is_cut_short or is_late else ""
    return ""


def _is_full(world: "World", call: Call) -> bool:
    """Whether the queue was full. For a front end behind a stream it may have changed since, so it counts as full."""
    scheduler, num_choices = world.step_loop.scheduler, len(call.asked.truths)
    assert scheduler is not None
    queue, config = scheduler._queue, world.config
    num_tokens = num_choices * len(call.asked.message.prompt.token_ids.ids)
    return (
        call.front_end.attachment is None
        or queue.num_new + num_choices > config.max_num_waiting
        or (queue.num_new > 0 and queue.num_new_tokens + num_tokens > config.max_num_waiting_tokens)
    )


def _may_not_fit(world: "World", asked: Asked) -> bool:
    """Whether the request may not fit one of the workers that the scheduler has had."""
    return len(asked.truths) > world.config.max_num_waiting or any(
        asked.num_tokens > info.max_model_len or asked.num_tokens - 1 > (info.num_blocks - 1) * info.block_size
        for info in world.worker_infos
    )


class _Watcher(logging.Handler):
    """Checks the exceptions that Tandem survives and logs: a fault must explain each."""

    def __init__(self, world: "World") -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        is_injected = isinstance(error, InjectedFault) or (
            isinstance(error, ProtocolError) and bool(self._world.events[MISFIT])
        )
        if error is not None and not is_injected:
            self._world.fail(f"{record.getMessage()}: {error!r}")


@contextmanager
def watched_log(world: "World") -> Iterator[None]:
    loop, product = asyncio.get_running_loop(), logging.getLogger("tandem_scheduler")
    watcher, propagates = _Watcher(world), product.propagate
    product.addHandler(watcher)
    product.propagate = False
    loop.set_exception_handler(lambda _, context: world.fail(f"{context['message']}: {context.get('exception')!r}"))
    try:
        yield
    finally:
        product.removeHandler(watcher)
        product.propagate = propagates


async def check_end(world: "World") -> None:
    """Checks that nothing is left when a world has ended."""
    scheduler = world.step_loop.scheduler
    assert scheduler is not None
    check_books(world)
    load = scheduler.load()
    if load.num_used_blocks or load.num_running_sequences or load.num_waiting_sequences or scheduler.num_unfinished:
        world.fail(f"not all has ended: {load}")
    if load.num_steps_in_flight:
        world.fail(f"{load.num_steps_in_flight} steps are in flight")
    if world.hub._num_open or world.hub._sequences or world.hub._requests:
        world.fail("the hub has requests")
    for front_end in [*world.front_ends, *world.lost_front_ends]:
        if front_end.lives or front_end.handles:
            world.fail("a front end has requests")
    if unended := [call.asked.serial for call in world.calls if not call.is_ended]:
        world.fail(f"requests {unended} have not ended")
    _check_output_count(world, load.num_output_tokens)
    for _ in range(5):
        await asyncio.sleep(0)
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        world.fail(f"tasks are left: {left}")
    gc.collect()
    if any(len(front_end.opened) for front_end in [*world.front_ends, *world.lost_front_ends]):
        world.fail("requests are held in memory")


def _check_output_count(world: "World", num_counted: int) -> None:
    """Tokens past a stop string are not counted as output, unless the call ended before it saw its stop string, or the
    stream broke that was to report it.
    """
    least = most = 0
    for sequence_id, count in world.sink.num_tokens.items():
        call, choice = world.sequences[sequence_id]
        stop_at = call.asked.truths[choice].num_counted
        in_truth = count if stop_at is None else min(count, stop_at)
        least += in_truth
        is_told = call.is_answered and not (call.front_end.is_gone or world.is_cut_short)
        most += in_truth if is_told else count
    if not least <= num_counted <= most:
        world.fail(f"{num_counted} output tokens are counted, not {least} to {most}")
