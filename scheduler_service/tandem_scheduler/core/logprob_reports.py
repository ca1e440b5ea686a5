"""The log-probabilities that a step reports: to which sequences they belong and, for those of prompt tokens, which of
them the step must report, and which of a report are new.

A sequence that asks for log-probabilities of its prompt computes its whole prompt, without cached prefixes, until all
its positions but the first have been reported. After a preemption or a lost worker the worker computes the prompt, and
reports it, from the start; what the sequence had been told before is cut off here, so that each position comes out once
and in order.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tandem_scheduler.core.sequence import Sequence
from tandem_shared.step_plan import PromptLogprobs, RowLogprobs


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """The prompt positions first to end - 1 of a sequence, whose log-probabilities a step reports."""

    sequence: Sequence
    first: int
    end: int


def span_of_chunk(sequence: Sequence, num_tokens: int) -> PromptSpan | None:
    """The prompt positions that a step reports if it computes the next num_tokens tokens of a sequence: by computing a
    token it learns the log-probabilities of the position after it. None if there is nothing to report.
    """
    if not sequence.reports_prompt:
        return None
    first = sequence.num_computed_tokens + 1
    end = min(first + num_tokens, sequence.num_prompt_tokens)
    return PromptSpan(sequence, first, end) if first < end else None


def why_unfit(spans: dict[int, PromptSpan], reports: Iterable[PromptLogprobs], faulty_rows: set[int]) -> str | None:
    """What is wrong with the reports of a step that must report `spans`, by row. A row may have several reports, one
    after the other; a row with a fault may lack some.
    """
    positions = {row: span.first for row, span in spans.items()}
    for report in reports:
        row, count = report.row, len(report.logprobs)
        if positions.get(row) != report.first_position:
            return f"reports prompt position {report.first_position} of row {row}, which is not due"
        num_top = report.num_top * count
        if (len(report.ranks), len(report.top_token_ids), len(report.top_logprobs)) != (count, num_top, num_top):
            return f"has reports of prompt tokens of row {row} that are not parallel"
        if not 0 < count <= spans[row].end - report.first_position:
            return f"reports {count} prompt tokens of row {row} from position {report.first_position}"
        positions[row] += count
    unsaid = [row for row, span in spans.items() if positions[row] < span.end and row not in faulty_rows]
    return f"does not report the prompt of row {unsaid[0]}" if unsaid else None


def take_reports(spans: dict[int, PromptSpan], reports: Iterable[PromptLogprobs]) -> list[tuple[int, PromptLogprobs]]:
    """The new parts of a step's reports with their sequences' ids, in order; nothing for ended sequences."""
    taken = []
    for report in reports:
        sequence = spans[report.row].sequence
        end = report.first_position + len(report.logprobs)
        if sequence.is_finished or end <= sequence.next_reported_position:
            continue
        num_known = sequence.next_reported_position - report.first_position
        assert num_known >= 0, f"sequence {sequence.sequence_id}: prompt positions are reported with a gap"
        sequence.next_reported_position = end
        taken.append((sequence.sequence_id, _without_first(report, num_known)))
    return taken


def _without_first(report: PromptLogprobs, count: int) -> PromptLogprobs:
    if not count:
        return report
    return replace(
        report,
        first_position=report.first_position + count,
        logprobs=report.logprobs[count:],
        ranks=report.ranks[count:],
        top_token_ids=report.top_token_ids[count * report.num_top :],
        top_logprobs=report.top_logprobs[count * report.num_top :],
    )


def reports_by_sequence(
    owners: dict[int, Sequence], reports: Iterable[RowLogprobs], confirmed_ids: Collection[int]
) -> dict[int, RowLogprobs]:
    """The reports on sampled tokens by the ids of their sequences, without those of sequences that got no token here.
    owners: the sequences by row, without those with a fault, for whose rows there may be reports too.
    """
    confirmed = set(confirmed_ids)
    owned = [(owners[report.row].sequence_id, report) for report in reports if report.row in owners]
    return {sequence_id: report for sequence_id, report in owned if sequence_id in confirmed}
