"""What breaks in a simulated world. Each fault is a function that returns whether it happened just now. A function that
only prepares a fault of a later step returns False, and the fault is counted when it comes.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from tandem_scheduler.core.suspects import Suspects
from tandem_shared.errors import InvalidPlan, RequestNotFound, TandemError, WorkerFailed, WorkerUnavailable
from tests.chaos.simulation.calls import Call
from tests.chaos.simulation.front_end import RemoteFrontEnd
from tests.chaos.simulation.worker import ROW_FAULTS, random_size

if TYPE_CHECKING:
    from tests.chaos.simulation.world import World

OTHER_MODELS = ("fake-model", "other-model")


async def vanish(world: "World") -> bool:
    return _lose(world, _gone(), world.rng.choice([0.0, 0.05, 1.0, 3.0]))


async def fail_with_last_word(world: "World") -> bool:
    word = world.rng.choice([WorkerFailed("a step failed"), InvalidPlan("the batch can't follow the plan")])
    return _lose(world, word, world.rng.choice([0.05, 1.0]))


async def lose_again_and_again(world: "World") -> bool:
    """Loses the worker soon after each return, so that harmless sequences are suspected, and hit while they are on
    trial.
    """
    for _ in range(world.rng.randint(3, 8)):
        for _ in range(100):
            if world.worker.sound_session is not None:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(world.rng.uniform(0.0, 0.1))
        await world.rng.choice([vanish, fail_with_last_word])(world)
    return True


async def hang(world: "World") -> bool:
    session = world.worker.sound_session
    if session is None or _accuses_an_innocent(world):
        return False
    session.hang()
    return False


async def answer_what_does_not_fit(world: "World") -> bool:
    session = world.worker.sound_session
    if session is None or _accuses_an_innocent(world):
        return False
    session.is_misfit_due = True
    return False


async def compute_for_long(world: "World") -> bool:
    session = world.worker.sound_session
    if session is None:
        return False
    session.next_step_s = 2 * world.step_timeout_s
    # No other fault comes meanwhile.
    await asyncio.sleep(3 * world.step_timeout_s)
    return False


async def stay_away(world: "World") -> bool:
    return _lose(world, _gone(), world.worker_wait_s + world.rng.uniform(-5.0, 30.0))


async def come_with_another_size(world: "World") -> bool:
    return _lose(world, _gone(), world.rng.choice([0.05, 1.0]), **random_size(world.rng))


async def come_with_another_model(world: "World") -> bool:
    """Comes while live requests still wait for their own model, or after they have ended."""
    away_s = world.rng.choice([0.5, world.worker_wait_s + 2.0])
    return _lose(world, _gone(), away_s, fingerprint=world.rng.choice(OTHER_MODELS))


async def refuse_the_session(world: "World") -> bool:
    world.worker.refusals = world.rng.randint(1, 3)
    return _lose(world, _gone(), 0.0)


async def lose_a_front_end(world: "World") -> bool:
    """Loses a front end, after another one has taken its place."""
    front_end = await world.replace_front_end()
    if isinstance(front_end, RemoteFrontEnd) and world.rng.random() < 0.5:
        front_end.break_off()
    else:
        front_end.die()
    return True


async def stall_a_stream(world: "World") -> bool:
    remote = [front_end for front_end in world.front_ends if isinstance(front_end, RemoteFrontEnd)]
    if not remote:
        return False
    world.rng.choice(remote).link.stall(world.rng.choice([0.5, 3.0, 15.0]))
    return True


async def raise_in_a_listener(world: "World") -> bool:
    front_end = world.rng.choice(world.front_ends)
    front_end.is_to_raise = True
    return False


async def raise_in_the_sink(world: "World") -> bool:
    world.sink.is_to_raise = True
    return False


async def raise_in_the_sink_at_ends(world: "World") -> bool:
    """Raises at sequences that end because a worker was lost, or came."""
    world.sink.is_to_raise_at_ends = True
    return False


async def cancel_calls(world: "World") -> bool:
    calls = _running(world)
    for call in world.rng.sample(calls, min(len(calls), world.rng.randint(1, 4))):
        assert call.task is not None
        call.task.cancel()
    return bool(calls)


async def abort_a_request(world: "World") -> bool:
    calls = _running(world)
    if not calls:
        return False
    call = world.rng.choice(calls)
    request_id = call.asked.message.request_id
    try:
        world.hub.abort(request_id)
    except RequestNotFound:
        return False
    if request_id in world.hub._requests:
        world.fail("an aborted request is live")
    for each in calls:
        # If several calls have the id, one of them was live.
        each.is_aborted |= each.asked.message.request_id == request_id
    return True


async def reset_the_prefix_cache(world: "World") -> bool:
    scheduler = world.step_loop.scheduler
    return scheduler is not None and scheduler.reset_prefix_cache() > 0


async def send_a_burst(world: "World") -> bool:
    for _ in range(world.rng.randint(5, 12)):
        world.start_call()
    return True


FAULTS: dict[str, tuple[float, Callable[["World"], Awaitable[bool]]]] = {
    "worker vanishes": (2.0, vanish),
    "worker fails with a last word": (1.0, fail_with_last_word),
    "worker is lost again and again": (0.5, lose_again_and_again),
    "worker hangs": (0.3, hang),
    "result that does not fit": (0.5, answer_what_does_not_fit),
    "long step that gets on": (0.3, compute_for_long),
    "worker stays away for long": (0.4, stay_away),
    "worker comes back with another size": (1.5, come_with_another_size),
    "worker comes back with another model": (0.6, come_with_another_model),
    "session refused": (0.3, refuse_the_session),
    "front end lost": (1.0, lose_a_front_end),
    "stream to a front end stalls": (0.5, stall_a_stream),
    "listener raises": (0.7, raise_in_a_listener),
    "sink raises": (0.5, raise_in_the_sink),
    "sink raises at ends": (1.0, raise_in_the_sink_at_ends),
    "calls cancelled": (3.0, cancel_calls),
    "request aborted": (3.0, abort_a_request),
    "prefix cache reset": (1.0, reset_the_prefix_cache),
    "burst of calls": (0.5, send_a_burst),
}
"""Each fault with its weight in the random choice, and its function."""


def _gone() -> WorkerUnavailable:
    """A new error for each loss, as an exception that is raised again keeps all frames that it passed through."""
    return WorkerUnavailable("connection reset")


def _lose(world: "World", error: TandemError, away_s: float, **changes: object) -> bool:
    session = world.worker.sound_session
    if session is None or _accuses_an_innocent(world):
        return False
    if _is_innocent_on_trial(world):
        world.count("loss in the trial of an innocent")
    session.lose("injected", error, may_finish_steps=world.rng.random() < 0.3)
    if away_s:
        world.worker.go_away(away_s, **changes)
        world.worker_infos.append(dataclasses.replace(world.worker.info, **changes))  # type: ignore[arg-type]
    return True


def _accuses_an_innocent(world: "World") -> bool:
    """Whether a loss now would be the second in the trials of a harmless sequence. Such a sequence would be convicted,
    as docs/decisions/0002-suspects.md says, so the world does not lose its worker then.
    """
    tried = _suspects(world)._on_trial
    return _is_innocent_on_trial(world) and tried is not None and tried.num_trial_losses > 0


def _is_innocent_on_trial(world: "World") -> bool:
    tried = _suspects(world)._on_trial
    if tried is None or not _suspects(world)._is_trial_on:
        return False
    flaw = world.calls[tried.request.sampling.seed - 1].asked.flaw
    return flaw is None or flaw.kind in ROW_FAULTS


def _suspects(world: "World") -> Suspects:
    assert world.step_loop.scheduler is not None
    return world.step_loop.scheduler._suspects


def _running(world: "World") -> list[Call]:
    return [call for call in world.calls[-50:] if not call.is_ended]
