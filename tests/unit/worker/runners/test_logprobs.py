"""Log-probabilities of outputs and prompts against torch's log_softmax and transformers' full forward pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import NO_LISTS, SamplingLists
from tandem_shared.step_plan import NewRow, PromptLogprobs, RowLogprobs, StepPlan, StepResult
from tandem_worker.runners import logprobs as logprobs_module
from tandem_worker.runners.logprobs import QueuedLogprobs, likeliest, logprob_rows, pack_logprobs
from tandem_worker.runners.row_options import RowOptions
from tests.support.model_factory import save_random_model
from tests.unit.worker.runners.test_exactness import make_runner, reference_logits

VOCAB = 30


def new_row(row: int, sampling: RowSampling, lists: SamplingLists = NO_LISTS) -> NewRow:
    return NewRow(row, row, np.array([1], np.int32), 1, 0, 0, np.ones(1, np.int32), sampling, lists)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=VOCAB), st.integers(0, 20))
def test_of_equal_tokens_the_lowest_ids_are_the_likeliest(logits: list[int], count: int) -> None:
    count = min(count, len(logits))
    found = likeliest(torch.tensor([logits, logits[::-1]], dtype=torch.float64), count)
    for line, row in zip(found.tolist(), (logits, logits[::-1]), strict=True):
        assert line == sorted(range(len(row)), key=lambda token_id: (-row[token_id], token_id))[:count]


def expected_report(row: int, logits: torch.Tensor, token_id: int, asked: NewRow) -> RowLogprobs:
    distribution = logits.log_softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: asked.sampling.num_logprobs or 0]
    return RowLogprobs(
        row=row,
        logprob=float(distribution[token_id]),
        top_token_ids=tuple(order),
        top_logprobs=tuple(distribution[order].tolist()),
        rank=1 + int((logits > logits[token_id]).sum()),
        requested_logprobs=tuple(distribution[list(asked.lists.logprob_token_ids)].tolist()),
    )


def assert_equal_reports(found: RowLogprobs, expected: RowLogprobs) -> None:
    assert (found.row, found.rank, found.top_token_ids) == (expected.row, expected.rank, expected.top_token_ids)
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-6)
    np.testing.assert_allclose(found.requested_logprobs, expected.requested_logprobs, rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [VOCAB, 7])
def test_each_row_gets_what_it_asked_for(vocab_size: int) -> None:
    asked = [
        new_row(0, RowSampling(num_logprobs=3)),
        new_row(2, RowSampling()),
        new_row(3, RowSampling(num_logprobs=20), SamplingLists(logprob_token_ids=(5, 5, 0))),
        new_row(5, RowSampling(), SamplingLists(logprob_token_ids=(1,))),
        new_row(6, RowSampling(num_logprobs=0)),
        new_row(7, RowSampling(num_logprobs=2)),
    ]
    options = RowOptions(8, torch.device("cpu"))
    options.set(asked)
    logits = torch.from_numpy(np.random.default_rng(0).integers(-4, 4, (6, vocab_size)).astype(np.float64))
    sampled = torch.tensor([4, 1, 2, 3, 6, -1])
    rows = logprob_rows(np.array([0, 2, 3, 5, 6, 7], np.int32), options)
    assert rows is not None and rows.places == [0, 2, 3, 4, 5]
    packed = pack_logprobs(
        logits[rows.places],
        sampled[rows.places].clamp(min=0),
        max(rows.num_top),
        torch.tensor(rows.requested_ids).long(),
    )
    reports = QueuedLogprobs(rows, packed).read(sampled.tolist())
    places = [0, 2, 3, 4]  # Row 2 asks for nothing, and row 7 could not sample.
    for report, place in zip(reports, places, strict=True):
        row = asked[place]
        assert_equal_reports(report, expected_report(row.row, logits[place], int(sampled[place]), row))


def test_nothing_is_computed_if_no_row_asks() -> None:
    options = RowOptions(2, torch.device("cpu"))
    options.set([new_row(0, RowSampling(num_logprobs=3)), new_row(1, RowSampling())])
    assert logprob_rows(np.array([1], np.int32), options) is None
    options.set([new_row(0, RowSampling())])
    assert logprob_rows(np.array([0, 1], np.int32), options) is None


PROMPTS = {0: 90, 1: 1, 2: 31, 4: 2, 5: 40}
TOPS = {0: 5, 1: 3, 2: None, 4: 0, 5: 20}
NUM_OUTPUT = {0: 0, 1: 0, 2: 0, 4: 0, 5: 7}
"""Row 5 comes back with tokens that it has sampled."""


def prompt_rows() -> list[NewRow]:
    rng = np.random.default_rng(1)
    rows = []
    for index, (row, length) in enumerate(PROMPTS.items()):
        ids = rng.integers(0, 256, length + NUM_OUTPUT[row]).astype(np.int32)
        blocks = np.arange(1 + 10 * index, 11 + 10 * index, dtype=np.int32)
        sampling = RowSampling(temperature=0.0, repetition_penalty=2.0, num_prompt_logprobs=TOPS[row])
        rows.append(NewRow(row, row, ids, length, 0, 0, blocks, sampling))
    # The order in which rows are added is not that of their numbers.
    return rows[::-1]


def run_chunks(folder: Path, chunk: int) -> list[StepResult]:
    runner, added, left, results = make_runner(folder), prompt_rows(), {}, []
    left = {new.row: len(new.token_ids) for new in added}
    while any(left.values()):
        rows = sorted(row for row, count in left.items() if count)
        counts = [min(chunk, left[row]) for row in rows]
        plan = StepPlan(
            len(results) + 1,
            added_rows=() if results else tuple(added),
            chunk_rows=np.array(rows, np.int32),
            chunk_num_tokens=np.array(counts, np.int32),
        )
        results.append(runner.execute(plan).wait())
        left |= {row: left[row] - count for row, count in zip(rows, counts, strict=True)}
    return results


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("max_logits", [256, 10])
def test_prompts_are_reported_as_transformers_sees_them(
    chunk: int, max_logits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_PROMPT_LOGITS", max_logits)
    folder = save_random_model(tmp_path, initializer_range=0.1)
    reports: dict[int, list[PromptLogprobs]] = {row: [] for row in PROMPTS}
    for result in run_chunks(folder, chunk):
        rows = [report.row for report in result.prompt_logprobs]
        assert rows == sorted(set(rows))
        for report in result.prompt_logprobs:
            reports[report.row].append(report)
    assert not reports[1] and not reports[2]
    for new in prompt_rows():
        num_top = TOPS[new.row]
        if num_top is None:
            continue
        ids = new.token_ids[: new.num_prompt_tokens].tolist()
        logits = reference_logits(folder, ids)[:-1]
        distribution = logits.log_softmax(-1)
        position = 1
        for report in reports[new.row]:
            assert (report.first_position, report.num_top) == (position, num_top)
            tops = np.reshape(report.top_token_ids, (len(report.ranks), num_top))
            top_logprobs = np.reshape(report.top_logprobs, (len(report.ranks), num_top))
            for i, (logprob, rank) in enumerate(zip(report.logprobs, report.ranks, strict=True)):
                line, token_id = distribution[position - 1], ids[position]
                assert logprob == pytest.approx(float(line[token_id]), abs=1e-4)
                assert rank == 1 + int((line > line[token_id]).sum())
                assert tops[i].tolist() == line.topk(num_top).indices.tolist()
                np.testing.assert_allclose(top_logprobs[i], line[tops[i]], atol=1e-4)
                position += 1
        assert position == len(ids)


def test_prompts_logits_are_a_sign_of_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "MAX_PROMPT_LOGITS", 30)
    runner = make_runner(save_random_model(tmp_path, num_hidden_layers=3))
    (new,) = (row for row in prompt_rows() if row.row == 0)
    for step_id, (top, num_slices) in enumerate([(None, 0), (2, 3)], 1):
        row = replace(new, sampling=RowSampling(num_prompt_logprobs=top))
        removed = np.array([0] if step_id > 1 else [], np.int32)
        before = runner.progress
        runner.execute(
            StepPlan(
                step_id, removed, (row,), chunk_rows=np.array([0], np.int32), chunk_num_tokens=np.array([90], np.int32)
            )
        ).wait()
        assert runner.progress == before + 3 + num_slices


def test_logits_that_are_not_finite_have_valid_ids() -> None:
    """The reports of rows that can't sample are dropped; those of prompts are not."""
    logits = torch.zeros(3, VOCAB)
    logits[0] = torch.nan
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    assert ((likeliest(logits, 20) >= 0) & (likeliest(logits, 20) < VOCAB)).all()
