"""Checks the scheduler's books against each other. The cost grows with all that is live: for tests and idle moments."""

from collections import Counter
from collections.abc import Collection, Iterable

from tandem_scheduler.core.residency import Residency
from tandem_scheduler.core.rows import Rows
from tandem_scheduler.core.sequence import Sequence, SequenceState
from tandem_scheduler.core.steps_in_flight import StepsInFlight


def check_integrity(
    live: Collection[Sequence],
    queue: Iterable[Sequence],
    residency: Residency,
    in_flight: StepsInFlight,
) -> None:
    """Raises AssertionError where the books don't balance. queue may hold entries that no longer wait."""
    rows, blocks = residency.rows, residency.blocks
    running = rows.running()
    blocks.check_integrity(Counter(block_id for sequence in running for block_id in sequence.block_table))
    assert set(running) == {s for s in live if s.state is SequenceState.RUNNING}, "rows and states differ"
    assert all(s.state is not SequenceState.FINISHED for s in live), "a finished sequence is live"
    waiting = [s for s in queue if s.state is SequenceState.WAITING]
    assert len(waiting) == len(set(waiting)), "a sequence waits twice"
    assert set(waiting) == {s for s in live if s.state is SequenceState.WAITING}, "queue and states differ"
    assert set(residency.prefilling) == {s for s in running if not rows.is_decoding[s.row]}, "rows and prefills differ"
    for sequence in live:
        num_outstanding = in_flight.count(sequence)
        assert not (sequence.num_output_tokens and sequence.lacks_prompt_logprobs), "a prompt is not reported in time"
        if sequence.state is SequenceState.RUNNING:
            _check_running(sequence, rows, blocks.block_size, num_outstanding)
        else:
            assert sequence.row == -1, f"sequence {sequence.sequence_id} holds a row"
            assert not sequence.block_table, f"sequence {sequence.sequence_id} holds blocks"
            if sequence.state is SequenceState.WAITING:
                assert sequence.num_outstanding == num_outstanding
            else:
                assert len(sequence.token_ids) + num_outstanding == sequence.max_len


def _check_running(sequence: Sequence, rows: Rows, block_size: int, num_outstanding: int) -> None:
    row = sequence.row
    assert rows.sequences[row] is sequence
    capacity = len(sequence.block_table) * block_size
    if rows.is_decoding[row]:
        assert rows.capacity[row] == capacity
        assert rows.next_position[row] <= capacity
        assert rows.next_position[row] <= rows.last_position[row] < sequence.max_len
        assert rows.next_position[row] == len(sequence.token_ids) + num_outstanding - 1
    else:
        assert num_outstanding == 0
        assert sequence.num_computed_tokens < len(sequence.token_ids) <= capacity
