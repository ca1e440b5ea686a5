"""What the worker measures of its steps, for its own port. The scheduler's metrics have what matters of it too; here it
can be seen without a scheduler, and by the worker's own clock alone.
"""

from collections.abc import Iterator

from tandem_shared import VERSION
from tandem_shared.metrics.exposition import Metric, Sample, Samples
from tandem_shared.step_plan import StepResult, WorkerInfo

_STEP_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 30.0, 60.0),
)

INFO = Metric(
    "worker_info", "gauge", "Always 1; the labels say what the worker is.", ("version", "dtype", "device", "instance")
)
KV_BLOCKS = Metric("worker_kv_blocks", "gauge", "KV blocks that sequences can have.")
SESSION_OPEN = Metric("worker_session_open", "gauge", "1 while a scheduler has a session, else 0.")
SESSIONS = Metric("worker_sessions", "counter", "Sessions that schedulers have opened.")
PLANS_WAITING = Metric("worker_plans_waiting", "gauge", "Plans that have come and have no result yet.")
TOKENS = Metric("worker_tokens", "counter", "Tokens that were sampled.")
STEP_TIME = Metric(
    "worker_step_time_seconds",
    "histogram",
    "From a plan, or the end of the step before, until the step's tokens were on the host.",
    buckets=_STEP_S,
)
SEND_TIME = Metric(
    "worker_result_time_seconds",
    "counter",
    "Time from then until the result was handed to gRPC.",
)
GPU_TIME = Metric("worker_gpu_time_seconds", "counter", "Time in which the GPU was at steps. 0 on a CPU.")
GPU_IDLE = Metric(
    "worker_gpu_idle_seconds",
    "counter",
    "Time for which the GPU idled before steps whose plan had come before the step before ended. 0 on a CPU.",
)

WORKER_METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class WorkerMetrics:
    """Counts since the process started."""

    def __init__(self) -> None:
        self._num_sessions = 0
        self._num_tokens = 0
        self._step_time = STEP_TIME.histogram()
        self._send_ns = self._gpu_ns = self._gpu_idle_ns = 0
        self._last_sampled_ns = 0

    def note_session(self) -> None:
        self._num_sessions += 1

    def note_step(self, result: StepResult) -> None:
        """Counts a step whose result is about to be sent."""
        times = result.times
        was_there = times.received_ns < self._last_sampled_ns
        started_ns = max(times.received_ns, self._last_sampled_ns)
        self._last_sampled_ns = times.sampled_ns
        self._num_tokens += len(result.token_ids)
        # The clock may be set meanwhile.
        self._step_time.observe(max(times.sampled_ns - started_ns, 0) / 1e9)
        self._send_ns += max(times.sent_ns - times.sampled_ns, 0)
        self._gpu_ns += times.gpu_duration_ns
        if was_there:
            self._gpu_idle_ns += times.gpu_idle_ns

    def read(self, prefix: str, info: WorkerInfo, num_waiting: int | None) -> Samples:
        """The values of now. num_waiting: plans without a result, None if there is no session."""
        return Samples(prefix, {"model_name": info.model}, list(self._samples(info, num_waiting)))

    def _samples(self, info: WorkerInfo, num_waiting: int | None) -> Iterator[Sample]:
        yield INFO, {(VERSION, info.dtype, info.device, info.worker_instance_id): 1}
        yield STEP_TIME, {(): self._step_time.copy()}
        numbers = {
            KV_BLOCKS: info.num_blocks - 1,
            SESSION_OPEN: num_waiting is not None,
            SESSIONS: self._num_sessions,
            PLANS_WAITING: num_waiting or 0,
            TOKENS: self._num_tokens,
            SEND_TIME: self._send_ns / 1e9,
            GPU_TIME: self._gpu_ns / 1e9,
            GPU_IDLE: self._gpu_idle_ns / 1e9,
        }
        for metric, value in numbers.items():
            yield metric, {(): value}
