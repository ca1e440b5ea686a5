"""Does the harness notice a broken build? Each mutation is a fault of one place, put into a copy of the tree, in which
the short form of the part that should notice it must fail.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import REPOSITORY
from tests.chaos.part import Form, Found, Part, Row

TIMEOUT_S = 600.0
"""A build that hangs is noticed by the tests' own timeouts, long before this."""
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in the file, becomes `new`. part: whose short form notices it."""

    file: str
    old: str
    new: str
    part: str


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "scheduler_service/step_loop.py",
        "            self._sink.on_outputs(outputs)\n",
        "            outputs.step_id % 50 == 7 or self._sink.on_outputs(outputs)\n",
        "kills",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "self._tell_finished(self.scheduler.lose_worker(failure))",
        "self.scheduler.lose_worker(failure)",
        "kills",
    ),
    Mutation("scheduler_service/step_loop.py", "failure = str(error)", 'failure = ""', "kills"),
    Mutation(
        "scheduler_service/core/scheduler.py",
        "self._in_flight: deque[_StepInFlight] = deque()",
        "self._in_flight: deque[_StepInFlight] = getattr(self, '_in_flight', deque())",
        "kills",
    ),
    Mutation("scheduler_service/core/suspects.py", "if count < (MAX_FAILED", "if count <= (MAX_FAILED", "kills"),
    Mutation(
        "worker_service/session.py",
        "            self._news.put_nowait(result)",
        "            self._num_answered % 40 == 7 or self._news.put_nowait(result)",
        "kills",
    ),
    Mutation(
        "worker_service/batch.py",
        "self.is_present[plan.removed_rows] = False\n        for new",
        "self.is_present[plan.removed_rows[1:]] = False\n        for new",
        "kills",
    ),
    Mutation(
        "shared/supervisor.py", "if self._is_stopping or status == 0:", "if self._is_stopping or status <= 0:", "kills"
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "if self.num_new + len(lengths) > most:",
        "if self.num_new + len(lengths) > most + 8:",
        "overload",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "self.num_new_tokens + sum(lengths) > self._max_num_new_tokens",
        "self.num_new_tokens > self._max_num_new_tokens",
        "overload",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "        self.num_new -= 1\n",
        "        self.num_new -= 0\n",
        "overload",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py", "if deadline <= now:", "if deadline <= now - 0.1:", "admission"
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "if expired := self.scheduler.expire(time.monotonic()):",
        "if expired := []:",
        "admission",
    ),
    Mutation(
        "scheduler_service/servicer.py",
        "return None if left_s is None else time.monotonic() + left_s",
        "return None",
        "admission",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "pending.token_ids.append(token_id)",
        "pending.token_ids.append(token_id ^ 1)",
        "overload",
    ),
    Mutation(
        "scheduler_service/engine_hub.py", "        self._num_open -= 1\n", "        self._num_open -= 0\n", "admission"
    ),
    Mutation(
        "scheduler_service/live_request.py", "self._num_taken += len(token_ids)", "self._num_taken += 1", "overload"
    ),
    Mutation(
        "scheduler_service/front_end.py",
        "if live.is_streaming:\n                live.has_news.set()",
        "if False:\n                live.has_news.set()",
        "overload",
    ),
    Mutation("scheduler_service/front_end.py", "self.engine.close_request(live.first_handle)", "pass", "admission"),
    Mutation(
        "shared/call_gate.py", "            self._num_open -= 1\n", "            self._num_open -= 0\n", "overload"
    ),
    Mutation("scheduler_service/service.py", "timeout=grace_s", "timeout=0.0", "restarts"),
    Mutation(
        "scheduler_service/engine_hub.py",
        "        await self._is_idle.wait()",
        "        await asyncio.sleep(0)",
        "restarts",
    ),
    Mutation(
        "scheduler_service/engine_hub.py", "        if not self._num_open:", "        if self._num_open:", "restarts"
    ),
    Mutation(
        "scheduler_service/engine_servicer.py",
        "        for outbox in self._outboxes:\n            outbox.close()",
        "        pass",
        "restarts",
    ),
    Mutation(
        "shared/supervisor.py", "signal.SIGKILL if self._is_stopping else signal.SIGTERM", "signal.SIGKILL", "restarts"
    ),
    Mutation(
        "shared/server.py",
        "(self.second if self.first.is_set() else self.first).set()",
        "self.second.set()",
        "restarts",
    ),
    Mutation(
        "worker_service/weights.py",
        "        if not is_name or len(name) > MAX_NAME_CHARACTERS:",
        "        if not isinstance(name, str):",
        "folders",
    ),
    Mutation(
        "worker_service/weights.py",
        "        if tuple(shape) != target.shape:\n            raise",
        "        if False:\n            raise",
        "folders",
    ),
    Mutation("worker_service/config_file.py", "    except RecursionError:", "    except ZeroDivisionError:", "folders"),
    Mutation("shared/model_folder.py", "    if len(contents) > MAX_JSON_BYTES:", "    if not contents:", "folders"),
    Mutation(
        "shared/grpc_options.py",
        '("grpc.http2.ping_timeout_ms", timeout_ms)',
        '("grpc.http2.ping_timeout_ms", 10 * timeout_ms)',
        "silence",
    ),
    Mutation(
        "shared/grpc_options.py", "WORKER_KEEPALIVE_TIME_MS = 2_000", "WORKER_KEEPALIVE_TIME_MS = 20_000", "drops"
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "await self._sink.on_readiness(False)",
        "await self._sink.on_readiness(True)",
        "silence",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "        self._result_at = 0.0\n        self._has_news.set()",
        "        self._result_at = 0.0",
        "silence",
    ),
    Mutation("worker_service/servicer.py", "self._runner.reset()", "pass", "silence"),
    Mutation(
        "worker_service/servicer.py",
        "if request.session_epoch <= old.epoch:",
        "if request.session_epoch >= old.epoch:",
        "drops",
    ),
    Mutation("worker_service/session.py", "            self._plans.put(None)\n", "            pass\n", "silence"),
)


def mutate(root: Path, mutation: Mutation) -> None:
    """Changes the tree. Raises ValueError where the mutation does not fit it."""
    path = root / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    path.write_text(text.replace(mutation.old, mutation.new))


def run(first: int, count: int) -> Found:
    """Tries the mutations from the given one on."""
    tried = []
    for mutation in MUTATIONS[first : first + count]:
        with tempfile.TemporaryDirectory(prefix="tandem-mutation-") as folder:
            root = Path(folder, "tree")
            shutil.copytree(REPOSITORY, root, ignore=NOT_COPIED)
            mutate(root, mutation)
            tried.append({**vars(mutation), "noticed": how_it_fails(root, mutation.part)})
        print(f"  {mutation.file}: {mutation.new.strip()!r}: {tried[-1]['noticed'] or 'NOT NOTICED'}", flush=True)
    return {"mutations": tried}


def how_it_fails(root: Path, part: str) -> str:
    """What the short form of a part says of this tree; empty where all is well."""
    test = f"tests/chaos/test_forms.py::test_short_form[{part}]"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "--tb=line", test]
    try:
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no end in {TIMEOUT_S:g} s"
    if ended.returncode == 0:
        return ""
    told = [line for line in ended.stdout.splitlines() if line.startswith(("E ", "FAILED", "ERROR"))]
    return (told or ended.stdout.splitlines() or ["failed without a word"])[-1].replace(str(root), "")[:300]


def rows(pieces: Sequence[Found]) -> list[Row]:
    tried = [mutation for piece in pieces for mutation in piece["mutations"]]
    missed = [mutation for mutation in tried if not mutation["noticed"]]
    files = {mutation["file"] for mutation in tried}
    return [
        Row(
            "the harness notices a build that is broken",
            f"{len(tried)} faults of one place, put into {len(files)} files one at a time",
            f"{len(tried) - len(missed)} noticed by the short form",
            len(tried) >= 30 and not missed,
        )
    ]


BATCH = 5
PART = Part(
    "mutations",
    run,
    rows,
    {
        Form.SHORT: (),
        Form.LONG: (),
        Form.FULL: [{"first": first, "count": BATCH} for first in range(0, len(MUTATIONS), BATCH)],
    },
)
