"""A step that is computed as two micro-batches gives the same hidden states as one that is computed whole."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem_shared.config import WorkerSettings
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.step_plan import NewRow, StepPlan
from tandem_worker.ranks.communicator import Communicator
from tandem_worker.runners.batch import StepWork
from tandem_worker.runners.cuda.step_shapes import deal_chunks
from tandem_worker.runners.torch_runner import TorchRunner
from tandem_worker.startup import build_runner
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_batch import ints

PREFIX = np.arange(48, dtype=np.int32) * 5 % 256


def tokens_of(rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[tuple[int, int]]:
    """(row, position) of each token, in their order."""
    chunks = zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True)
    return [(row, start + i) for row, start, count in chunks for i in range(count)]


def make_work(rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, decode_rows: np.ndarray) -> StepWork:
    return StepWork(rows, starts, counts, decode_rows, sampling_rows=ints())


def new_row(row: int, token_ids: np.ndarray, block_ids: list[int], num_cached: int = 0) -> NewRow:
    return NewRow(
        row=row, sequence_id=0, token_ids=token_ids, num_prompt_tokens=len(token_ids), num_computed_tokens=num_cached,
        num_cached_tokens=num_cached, block_ids=np.array(block_ids, np.int32), sampling=RowSampling(),
    )  # fmt: skip


def plans() -> list[StepPlan]:
    """A row that decodes; half of a long prompt; its other half, and, in a row of a lower number, a prompt that shares
    all of it.
    """
    ids = np.arange(9, dtype=np.int32)
    sharing = new_row(0, np.concatenate([PREFIX, ids]), [4, 5, 6, 7], num_cached=len(PREFIX))
    return [
        StepPlan(1, added_rows=(new_row(2, ids, [1]),), chunk_rows=ints(2), chunk_num_tokens=ints(9)),
        StepPlan(2, added_rows=(new_row(1, PREFIX, [4, 5, 6]),), chunk_rows=ints(1), chunk_num_tokens=ints(20)),
        StepPlan(3, added_rows=(sharing,), chunk_rows=ints(0, 1), chunk_num_tokens=ints(9, 28)),
    ]


class Event:
    def wait(self) -> None:
        pass


class SideCommunicator(Communicator):
    """A group of one rank, for which an all-reduce beside other work is over at once."""

    def begin_all_reduce(self, x: torch.Tensor) -> Any:
        return Event()


def run_in_micro_batches(
    runner: TorchRunner, work: StepWork, micro_batch_tokens: tuple[int, ...]
) -> dict[tuple[int, int], torch.Tensor]:
    """The hidden state of each token, by row and position."""
    inputs, tokens = [], []
    decode_rows = work.decode_rows
    for chunks in deal_chunks(work, micro_batch_tokens):
        ids, metadata, _ = runner._prepare(make_work(*chunks, decode_rows))
        inputs.append((runner.model.embed_tokens(ids), metadata))
        positions = metadata.positions[len(tokens_of(*chunks)) :].tolist()
        tokens.append([*tokens_of(*chunks), *zip(decode_rows.tolist(), positions, strict=True)])
        decode_rows = decode_rows[:0]
    hidden = runner.model(runner.cache, *inputs)
    return dict(zip(itertools.chain(*tokens), itertools.chain(*hidden), strict=True))


def test_hidden_states_are_those_of_a_whole_step(tmp_path: Path) -> None:
    """Wherever the step is cut, also within what one prompt finds of another."""
    folder = save_random_model(tmp_path, dtype="float64")
    settings = WorkerSettings(model=str(folder), device="cpu", dtype="float64", num_blocks=16, num_threads=1)
    num_tokens = 1 + 28 + 9
    expected = None
    for first in (num_tokens, 1, 5, 20, 29, 33):
        runner = build_runner(settings, SideCommunicator())
        assert isinstance(runner, TorchRunner)
        *before, last = plans()
        for plan in before:
            runner.execute(plan).wait()
        micro_batches = (first, num_tokens - first) if first < num_tokens else (first,)
        with torch.inference_mode():
            hidden = run_in_micro_batches(runner, runner._batch.apply(last), micro_batches)
        assert len(hidden) == num_tokens
        expected = expected or hidden
        for token, x in hidden.items():
            torch.testing.assert_close(x, expected[token], atol=1e-10, rtol=0)
