"""The result of a step whose work is queued: it is waited for here."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tandem_shared.step_plan import FAULT_NAN_LOGITS, FAULT_NO_TOKEN, RowFault, StepResult, StepTimes
from tandem_worker.runners.logprobs import QueuedLogprobs, QueuedPromptLogprobs

NAN_LOGITS = -FAULT_NAN_LOGITS
"""What is sampled, in a token's place, for a row whose logits hold NaN or nothing finite"""
NO_TOKEN = -FAULT_NO_TOKEN
"""What is sampled for a row to which nothing is allowed"""


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
        logprobs: QueuedLogprobs | None = None,
        prompt_logprobs: QueuedPromptLogprobs | None = None,
        fault_codes: Mapping[int, int] | None = None,
    ) -> None:
        """token_ids (sampling rows,) has NAN_LOGITS or NO_TOKEN for a row that could not sample. On a GPU it is on the
        host after timing.ended, and so are the log-probabilities. fault_codes: by row, why nothing was allowed to it,
        where the runner knows more than NO_TOKEN says.
        """
        self._step_id = step_id
        self._rows = rows
        self._token_ids = token_ids
        self._timing = timing
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._fault_codes = fault_codes or {}

    def wait(self) -> StepResult:
        gpu_duration_ns = gpu_idle_ns = 0
        timing = self._timing
        if timing.started is not None and timing.ended is not None:
            timing.ended.synchronize()
            gpu_duration_ns = _nanoseconds(timing.started, timing.ended)
            if timing.previous_ended is not None:
                gpu_idle_ns = _nanoseconds(timing.previous_ended, timing.started)
        token_ids = self._token_ids.tolist()
        faults = [
            RowFault(row, self._fault_codes.get(row, FAULT_NO_TOKEN) if token_id == NO_TOKEN else -token_id)
            for row, token_id in zip(self._rows, token_ids, strict=True)
            if token_id < 0
        ]
        return StepResult(
            step_id=self._step_id,
            num_token_ids=[int(token_id >= 0) for token_id in token_ids] if faults else [1] * len(token_ids),
            token_ids=[token_id for token_id in token_ids if token_id >= 0] if faults else token_ids,
            faults=tuple(faults),
            logprobs=self._logprobs.read(token_ids) if self._logprobs else (),
            prompt_logprobs=self._prompt_logprobs.read() if self._prompt_logprobs else (),
            times=StepTimes(
                prepared_ns=timing.prepared_ns,
                sampled_ns=time.time_ns(),
                gpu_duration_ns=gpu_duration_ns,
                gpu_idle_ns=gpu_idle_ns,
            ),
        )


def _nanoseconds(before: torch.cuda.Event, after: torch.cuda.Event) -> int:
    """The time between two events that the GPU has reached, by its clock."""
    milliseconds: float = before.elapsed_time(after)
    return round(milliseconds * 1e6)
