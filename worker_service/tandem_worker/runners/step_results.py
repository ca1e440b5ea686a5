"""The result of a step whose work is queued: it is waited for here."""

import time
from dataclasses import dataclass

import torch

from tandem_shared.step_plan import FAULT_NAN_LOGITS, RowFault, RowLogprobs, StepResult, StepTimes
from tandem_worker.runners.transfers import to_host


@dataclass(frozen=True)
class HostLogprobs:
    """Log-probabilities whose copies to the host are queued."""

    logprobs: torch.Tensor  # (sampling rows,): those of the sampled tokens
    top_ids: torch.Tensor  # (sampling rows, most asked for)
    top_logprobs: torch.Tensor


@dataclass(frozen=True)
class Timing:
    """When the step's work was ready to be queued, in Unix nanoseconds, and on a GPU the events around it."""

    prepared_ns: int
    started: torch.cuda.Event | None = None
    """Before the step's first kernel"""
    ended: torch.cuda.Event | None = None
    """After the step's last kernel and the copies to the host"""
    previous_ended: torch.cuda.Event | None = None
    """The same event of the step before; None in a session's first step"""


class PendingStep:
    def __init__(
        self,
        step_id: int,
        rows: list[int],
        token_ids: torch.Tensor,
        timing: Timing,
        num_logprobs: list[int],
        logprobs: HostLogprobs | None,
    ) -> None:
        """token_ids (sampling rows,) is -1 where the logits are not finite. On a GPU it is on the host after
        timing.ended. num_logprobs: how many of the likeliest tokens each of `rows` asked for, -1 for no
        log-probabilities.
        """
        self._step_id = step_id
        self._rows = rows
        self._token_ids = token_ids
        self._timing = timing
        self._num_logprobs = num_logprobs
        self._logprobs = logprobs

    def wait(self) -> StepResult:
        gpu_duration_ns = gpu_idle_ns = 0
        timing = self._timing
        if timing.started is not None and timing.ended is not None:
            timing.ended.synchronize()
            gpu_duration_ns = _nanoseconds(timing.started, timing.ended)
            if timing.previous_ended is not None:
                gpu_idle_ns = _nanoseconds(timing.previous_ended, timing.started)
        token_ids = self._token_ids.tolist()
        faults = [row for row, token_id in zip(self._rows, token_ids, strict=True) if token_id < 0]
        return StepResult(
            step_id=self._step_id,
            num_token_ids=[int(token_id >= 0) for token_id in token_ids] if faults else [1] * len(token_ids),
            token_ids=[token_id for token_id in token_ids if token_id >= 0] if faults else token_ids,
            faults=tuple(RowFault(row, FAULT_NAN_LOGITS) for row in faults),
            logprobs=self._reports(token_ids),
            times=StepTimes(
                prepared_ns=timing.prepared_ns,
                sampled_ns=time.time_ns(),
                gpu_duration_ns=gpu_duration_ns,
                gpu_idle_ns=gpu_idle_ns,
            ),
        )

    def _reports(self, token_ids: list[int]) -> tuple[RowLogprobs, ...]:
        if self._logprobs is None:
            return ()
        logprobs = self._logprobs.logprobs.tolist()
        top_ids, top_logprobs = self._logprobs.top_ids.tolist(), self._logprobs.top_logprobs.tolist()
        return tuple(
            RowLogprobs(row, logprobs[i], tuple(top_ids[i][:count]), tuple(top_logprobs[i][:count]))
            for i, (row, count) in enumerate(zip(self._rows, self._num_logprobs, strict=True))
            if count >= 0 and token_ids[i] >= 0
        )


def _nanoseconds(before: torch.cuda.Event, after: torch.cuda.Event) -> int:
    """The time between two events that the GPU has reached, by its clock."""
    milliseconds: float = before.elapsed_time(after)
    return round(milliseconds * 1e6)


def report_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: list[int]) -> HostLogprobs | None:
    """The log-probabilities that rows asked for; None where none did. logits (rows, vocab), token_ids (rows,) and not
    negative, num_logprobs as PendingStep takes it.
    """
    most = max(num_logprobs, default=-1)
    if most < 0:
        return None
    distribution = logits.log_softmax(-1)
    tops = distribution.topk(min(most, logits.shape[1]), dim=-1)
    return HostLogprobs(
        to_host(distribution.gather(1, token_ids.long()[:, None])[:, 0]), to_host(tops.indices), to_host(tops.values)
    )
