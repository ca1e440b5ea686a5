"""Drives a runner without services: makes step plans for it, and keeps two of them in flight as the services do."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import BenchmarkError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_plan import Int32Array, NewRow, StepPlan
from tandem_worker.runners.runner import PendingStep, Runner

MAX_TOKEN_ID = 10_000
"""Well below the special tokens at the end of a real vocabulary."""


class RowAsks(NamedTuple):
    """What a row asks of sampling."""

    sampling: RowSampling
    lists: SamplingLists = NO_LISTS


class StepDriver:
    """Makes plans for a runner and executes them."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._step_id = 0
        self._num_rows = 0

    def step(self, **plan: Any) -> PendingStep:
        """Queues a step: in a step without arguments every row decodes. plan: fields of StepPlan."""
        self._step_id += 1
        return self.runner.execute(StepPlan(self._step_id, **plan))

    def reset(self) -> None:
        self.runner.reset()
        self._step_id = 0

    def start_decoding(self, rows: Sequence[RowAsks], context: int, num_steps: int) -> None:
        """Starts rows whose context, in tokens, is in the pool already, as after a prefix hit. They get blocks for
        num_steps steps.
        """
        self.reset()
        self._num_rows = len(rows)
        rng = np.random.default_rng(0)
        block_ids = scattered_blocks(len(rows), context + num_steps, self.runner.info.block_size, rng)
        tokens = self._random_tokens(rng, len(rows), context)
        added = tuple(
            NewRow(
                row=row, sequence_id=0, token_ids=tokens[row], num_prompt_tokens=context,
                num_computed_tokens=context - 1, num_cached_tokens=context, block_ids=block_ids[row],
                sampling=asks.sampling, lists=asks.lists,
            )
            for row, asks in enumerate(rows)
        )  # fmt: skip
        self._compute(added, 1).wait()

    def prefill(self, num_rows: int, length: int, sampling: RowSampling) -> PendingStep:
        """Queues a step of whole prompts. Tokens are random, as equal ones would take less power."""
        self.reset()
        num_blocks = -(-length // self.runner.info.block_size)
        tokens = self._random_tokens(np.random.default_rng(0), num_rows, length)
        added = tuple(
            NewRow(
                row=row, sequence_id=0, token_ids=tokens[row], num_prompt_tokens=length,
                num_computed_tokens=0, num_cached_tokens=0,
                block_ids=np.arange(row * num_blocks + 1, (row + 1) * num_blocks + 1, dtype=np.int32),
                sampling=sampling,
            )
            for row in range(num_rows)
        )  # fmt: skip
        return self._compute(added, length)

    def times_of_results(self, num_steps: int) -> list[float]:
        """Runs steps in which every row decodes, two plans in flight. Returns when each result was there, in seconds.

        Raises BenchmarkError where a row did not get its token.
        """
        times = []
        pending = self.step()
        for index in range(num_steps):
            following = self.step() if index < num_steps - 1 else None
            result = pending.wait()
            times.append(time.perf_counter())
            if len(result.token_ids) != self._num_rows:
                raise BenchmarkError(f"step {result.step_id}: {len(result.token_ids)} tokens, faults {result.faults}")
            if following is not None:
                pending = following
        return times

    def _random_tokens(self, rng: np.random.Generator, num_rows: int, length: int) -> Int32Array:
        """(num_rows, length)"""
        highest = min(MAX_TOKEN_ID, self.runner.info.vocab_size - 1)
        return rng.integers(0, highest + 1, (num_rows, length)).astype(np.int32)

    def _compute(self, added: tuple[NewRow, ...], num_tokens: int) -> PendingStep:
        """Queues a step that adds rows and computes num_tokens of each."""
        rows = np.arange(len(added), dtype=np.int32)
        return self.step(added_rows=added, chunk_rows=rows, chunk_num_tokens=np.full(len(added), num_tokens, np.int32))


def scattered_blocks(num_rows: int, num_tokens: int, block_size: int, rng: np.random.Generator) -> Int32Array:
    """Block ids (num_rows, blocks for num_tokens tokens) in no order, as in a server that has run for a while."""
    num_blocks = -(-num_tokens // block_size)
    return (rng.permutation(num_rows * num_blocks) + 1).astype(np.int32).reshape(num_rows, num_blocks)
