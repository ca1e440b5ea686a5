"""Predicts the rows of benchmarks.throughput for other numbers of ranks, from single steps profiled on two.

A kernel's work is shared by the ranks, or is repeated by each rank, or is a sum over the ranks. As some kernels
overlap, the parts of a step are scaled so that they add up to its measured time. A one-shot sum takes a start-up time
and a time that grows with the number of other ranks; a two-shot sum takes two start-ups and 2 (N - 1) / N of the time
of two ranks. Sums by copies move as much as two-shot ones, but beside the other work, so that the longer of the two
counts. The model leaves out that products get less efficient as they get narrower, and that GPUs that wait more draw
less power and clock higher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.step_times import CONTEXT
from benchmarks.step_times import MAX_NUM_BATCHED_TOKENS as PREFILL_TOKENS
from benchmarks.workloads import nano256
from tandem_worker.ranks.peer_memory import KERNEL_BYTES, max_one_shot_bytes

PROFILED_RANKS = 2
SUMS = ("_one_shot", "_two_shot", "_wait_for_all", "ncclDev", "Memcpy PtoP", "CUDAFunctor_add")
OWN = (
    "_rms_norm",
    "_plan_splits",
    "_begin_decode",
    "_embed",
    "Memcpy HtoD",
    "Memcpy DtoH",
    "Memset",
    "_take_best",
    "index",
)
"""Parts of kernels' names: SUMS are sums over the ranks, and the work of OWN does not shrink with more ranks."""
DECODE_ROWS = (1, 16, 64, 256)
"""The batch sizes of the profiled decode steps."""


@dataclass(frozen=True)
class StepParts:
    """The times of a step on PROFILED_RANKS ranks, in microseconds."""

    step: float
    shared: float
    own: float
    sums: float
    are_copies: bool

    @property
    def sum_share(self) -> float:
        """The share of sums in the GPU's busy time, hidden or not, with the wait for other ranks."""
        return self.sums / (self.shared + self.own + self.sums)


def parts_of_steps(report: Mapping[str, Any]) -> dict[str, StepParts]:
    """The parts of each profiled step in a result of benchmarks.step_times."""
    steps = {name: step for name, step in report.items() if isinstance(step, dict) and "kernels" in step}
    return {name: _parts_of(step["gpu_ms"] * 1e3, step["kernels"]) for name, step in steps.items()}


def _parts_of(step_us: float, kernels: Sequence[Mapping[str, Any]]) -> StepParts:
    sums = sum(kernel["us"] for kernel in kernels if _is_any(kernel, SUMS))
    own = sum(kernel["us"] for kernel in kernels if _is_any(kernel, OWN) and not _is_any(kernel, SUMS))
    shared = sum(kernel["us"] for kernel in kernels) - sums - own
    are_copies = any("Memcpy PtoP" in kernel["name"] for kernel in kernels)
    return StepParts(step_us, shared, own, sums, are_copies)


def _is_any(kernel: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(name in kernel["name"] for name in names)


class ScalingModel:
    def __init__(self, steps: Mapping[str, Any], all_reduce: Mapping[str, Any], hidden_size: int) -> None:
        """steps, all_reduce: results of benchmarks.step_times --profile and benchmarks.all_reduce on PROFILED_RANKS
        ranks.
        """
        self._steps = parts_of_steps(steps)
        self._sums = {int(size): ways for size, ways in all_reduce["by_message_bytes"].items()}
        self._hidden_size = hidden_size

    def rows(self, num_ranks: int) -> dict[str, float]:
        """The predicted rows of benchmarks.throughput, in its units."""
        decode = [self._step_us(f"decode_temperature_{rows}", rows, num_ranks) for rows in DECODE_ROWS]
        long_prompts = self._step_us("prefill_4x2048", PREFILL_TOKENS, num_ranks)
        short_prompts = self._step_us("prefill_16x512", PREFILL_TOKENS, num_ranks)
        rows = {f"decode_b{count}": us / 1e3 for count, us in zip(DECODE_ROWS, decode, strict=True) if count != 16}
        return rows | {
            "nano256": _nano256_us(decode, short_prompts) / 1e6,
            "prefill_64x2048": PREFILL_TOKENS / long_prompts * 1e6,
        }

    def _step_us(self, name: str, num_tokens: int, num_ranks: int) -> float:
        parts = self._steps[name]
        ratio = PROFILED_RANKS / num_ranks
        if parts.are_copies:
            return parts.own + max((parts.step - parts.own) * ratio, parts.sums * _copied(num_ranks))
        sums = parts.sums * self._sum_growth(2 * num_tokens * self._hidden_size, num_ranks)
        scale = parts.step / (parts.shared + parts.own + parts.sums)
        return scale * (parts.shared * ratio + parts.own + sums)

    def _sum_growth(self, num_bytes: int, num_ranks: int) -> float:
        """The time of a sum over num_ranks ranks relative to a one-shot sum over PROFILED_RANKS."""
        if num_ranks == 1:
            return 0.0
        least, profiled = self._us("one_shot", 0), self._us("one_shot", num_bytes)
        if num_bytes <= max_one_shot_bytes(num_ranks):
            return (least + (num_ranks - 1) * (profiled - least)) / profiled
        if num_bytes <= KERNEL_BYTES:
            return (2 * least + _copied(num_ranks) * (profiled - least)) / profiled
        start = self._us("copies", 0)
        return (start + _copied(num_ranks) * (self._us("copies", num_bytes) - start)) / profiled

    def _us(self, way: str, num_bytes: int) -> float:
        """Microseconds for a message, interpolated between the sizes that were timed; outside them, those of the
        nearest.
        """
        times = {size: ways[f"{way}_us"] for size, ways in self._sums.items() if f"{way}_us" in ways}
        return float(np.interp(num_bytes, list(times), list(times.values())))


def _copied(num_ranks: int) -> float:
    """The bytes that a rank moves in a two-shot sum or by copies, relative to a one-shot sum over two ranks."""
    return 2 * (num_ranks - 1) / num_ranks


def _nano256_us(decode: Sequence[float], prefill: float) -> float:
    """The time of nano256: all prompts in full steps, then a decode step for each token of the longest output. A decode
    step counts as one of rows with CONTEXT tokens each that have the same context in total.
    """
    prompts, output_lens = nano256()
    prompt_lens, lens = np.array([len(prompt) for prompt in prompts]), np.array(output_lens)
    total = float(prompt_lens.sum() / PREFILL_TOKENS * prefill)
    for step in range(1, lens.max()):
        rows = (prompt_lens[lens > step] + step).sum() / CONTEXT
        low = int(np.clip(np.searchsorted(DECODE_ROWS, rows) - 1, 0, len(DECODE_ROWS) - 2))
        slope = (decode[low + 1] - decode[low]) / (DECODE_ROWS[low + 1] - DECODE_ROWS[low])
        total += decode[low] + slope * (rows - DECODE_ROWS[low])
    return total
