"""Load reports in the form of ORCA, which calls bring back to clients and proxies that balance load by them."""

import time

from tandem.internal.v1 import orca_pb2
from tandem_scheduler.engine.observer import Event, RequestSubmitted
from tandem_scheduler.engine.step_loop import StepLoop

KEPT_S = 0.1
"""How long a report is given again, as making one takes time in proportion to the live sequences."""
RATE_WINDOW_S = 1.0
"""The least time over which requests are counted."""


class LoadReports:
    """The engine's load now. An observer, by tell()."""

    def __init__(self) -> None:
        self._report = b""
        self._made_at = 0.0
        self._num_requests = 0
        self._counted_since = time.monotonic()
        self._requests_per_s = 0.0

    def tell(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, RequestSubmitted):
            self._num_requests += 1

    def read(self, step_loop: StepLoop) -> bytes:
        """An encoded OrcaLoadReport, at most KEPT_S old. Empty before the first worker."""
        now, scheduler, worker = time.monotonic(), step_loop.scheduler, step_loop.worker
        if scheduler is None or worker is None:
            return b""
        if self._report and now - self._made_at < KEPT_S:
            return self._report
        if (elapsed := now - self._counted_since) >= RATE_WINDOW_S:
            self._requests_per_s = self._num_requests / elapsed
            self._num_requests, self._counted_since = 0, now
        load = scheduler.load()
        num_rows = min(step_loop.max_num_seqs, worker.max_num_rows)
        self._report = orca_pb2.OrcaLoadReport(
            rps_fractional=self._requests_per_s,
            application_utilization=(load.num_running_sequences + load.num_waiting_sequences) / num_rows,
            named_metrics={
                "kv_cache_usage_perc": load.num_used_blocks / load.num_total_blocks,
                "num_requests_running": load.num_running_sequences,
                "num_requests_waiting": load.num_waiting_sequences,
            },
        ).SerializeToString()
        self._made_at = now
        return self._report
