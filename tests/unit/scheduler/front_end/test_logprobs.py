"""Log-probabilities on their way to the reader: packed, and within the bounds on a reply's size."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.v1 import inference_pb2
from tandem_scheduler.front_end.logprob_buffer import LogprobBuffer, logprob_bytes
from tandem_scheduler.front_end.reply_size import max_reply_size, max_report_size, min_reply_size
from tandem_shared.step_plan import RowLogprobs
from tests.support.builders import prompt_logprobs

finite = st.floats(-100, 0, width=32)
VOCAB_SIZES = st.sampled_from([100, 1024, 151_936, 2**31])


@st.composite
def reports(draw: st.DrawFn) -> RowLogprobs:
    num_top, num_requested = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    return RowLogprobs(
        0,
        draw(finite),
        tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_top, max_size=num_top))),
        tuple(draw(st.lists(finite, min_size=num_top, max_size=num_top))),
        draw(st.integers(1, 2**31)),
        tuple(draw(st.lists(finite, min_size=num_requested, max_size=num_requested))),
    )


def unpacked(buffer: LogprobBuffer) -> list[RowLogprobs]:
    return [
        RowLogprobs(0, each.logprob, tuple(each.top_token_ids), tuple(each.top_logprobs), each.rank,
                    tuple(each.requested_logprobs))
        for each in buffer
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(all_reports=st.lists(reports(), max_size=8), cut=st.integers(0, 8), taken=st.integers(0, 8))
def test_reports_come_out_as_they_went_in(all_reports: list[RowLogprobs], cut: int, taken: int) -> None:
    buffer = LogprobBuffer()
    for report in all_reports:
        buffer.append(report)
    assert unpacked(buffer) == all_reports
    first = buffer.take(taken)
    assert (unpacked(first), unpacked(buffer)) == (all_reports[:taken], all_reports[taken:])
    buffer.cut(cut)
    assert unpacked(buffer) == all_reports[taken:][:cut]


def test_a_prompts_reports_come_out_token_by_token() -> None:
    buffer = LogprobBuffer()
    buffer.extend(prompt_logprobs(0, 1, (-1.0, -2.0), (7, 1), 2, (4, 5, 6, 7), (-0.5, -1.0, -2.0, -3.0)))
    assert unpacked(buffer) == [
        RowLogprobs(0, -1.0, (4, 5), (-0.5, -1.0), 7),
        RowLogprobs(0, -2.0, (6, 7), (-2.0, -3.0), 1),
    ]


def test_a_packed_report_takes_what_is_counted_for_it() -> None:
    buffer = LogprobBuffer()
    for _ in range(100):
        buffer.append(RowLogprobs(0, -1.0, (1,) * 20, (-1.0,) * 20, 3, (-1.0,) * 4))
    arrays = [getattr(buffer, name) for name in LogprobBuffer.__slots__]
    assert sum(each.itemsize * len(each) for each in arrays) == 100 * logprob_bytes(20, 4)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), vocab_size=VOCAB_SIZES, num_top=st.integers(0, 20), num_requested=st.integers(0, 20))
def test_a_tokens_size_in_a_reply_is_within_the_bounds(
    data: st.DataObject, vocab_size: int, num_top: int, num_requested: int
) -> None:
    """The upper bound leaves out texts and bytes, and the lower one holds for tokens that have none."""
    some_id, texts = st.integers(1, vocab_size - 1), st.text(max_size=40)
    token_id, text = data.draw(some_id), data.draw(texts)
    choice = inference_pb2.Choice(token_ids=[token_id])
    report = choice.logprobs.add(
        token_id=token_id, logprob=data.draw(finite), rank=data.draw(st.integers(1, vocab_size))
    )
    for others, count in ((report.top, num_top), (report.requested, num_requested)):
        for index in range(count):
            # Of several tokens one may have the id 0, and one the log-probability 0.
            others.add(token_id=data.draw(some_id) if index else 0, logprob=-0.5 if index else 0)
    bare = choice.ByteSize() - len(inference_pb2.Choice(token_ids=[0]).SerializeToString()) + 1
    assert bare >= min_reply_size(num_top, num_requested)
    for each in (report, *report.top, *report.requested):
        each.text, each.token_bytes = text, text.encode()
    num_texts = 2 * len(text.encode()) * (1 + num_top + num_requested)
    assert choice.ByteSize() - 2 - num_texts <= max_reply_size(vocab_size, num_top, num_requested)
    assert max_report_size(vocab_size, num_top, num_requested) < max_reply_size(vocab_size, num_top, num_requested)
