"""A front end without an engine: one batch of outputs for several requests, of which one fails."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from tandem_scheduler.core.types import FinishReason
from tandem_scheduler.engine_interface import EngineState, OutputBatch, RequestOutcome, SequenceEnd, Submission
from tandem_scheduler.front_end import front_end as front_end_module
from tandem_scheduler.front_end import live_request
from tandem_scheduler.front_end.front_end import FrontEnd
from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.live_request import MAX_TOKENS_PER_DELTA, LiveRequest
from tandem_scheduler.front_end.text.detokenizer import MIN_IDS_WITHOUT_GIL, TextDecoder
from tandem_scheduler.front_end.validation import check_request
from tandem_shared.errors import OutputTooLarge, TextFailed, WorkerUnavailable
from tandem_shared.step_plan import PromptLogprobs, RowLogprobs
from tests.support.builders import prompt_logprobs, worker_info
from tests.support.tokenizers import CountingTokenizer, PanicException, embedded

POISON = 500
WORKER = worker_info(vocab_size=1024)


class PoisonedDecoder(TextDecoder):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        if POISON in token_ids:
            raise PanicException("no text for this token")
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


class QuietEngine:
    """An engine that accepts all calls and sends nothing."""

    state = EngineState(WORKER, is_ready=True)

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.stopped: list[tuple[int, int]] = []

    async def submit(self, submission: Submission) -> None:
        pass

    def stop(self, handle: int, num_output_tokens: int) -> None:
        self.stopped.append((handle, num_output_tokens))

    def close_request(self, first_handle: int, outcome: RequestOutcome | None = None) -> None:
        self.closed.append(first_handle)


async def set_ready(is_ready: bool) -> None:
    pass


@pytest.fixture
def engine() -> QuietEngine:
    return QuietEngine()


@pytest.fixture
def front_end(engine: QuietEngine) -> FrontEnd:
    tokenizer: Tokenizer = embedded()
    front_end = FrontEnd(tokenizer, set_ready)
    front_end.decoder = PoisonedDecoder(tokenizer)
    front_end.connect(engine)
    return front_end


async def open_request(front_end: FrontEnd, **fields: object) -> LiveRequest:
    params = GenerationParams(**{"prompt_token_ids": [1], **fields})  # type: ignore[arg-type]
    return await front_end.open(await check_request(params, front_end.encoder, WORKER, "served"))


async def read(live: LiveRequest) -> list[int]:
    async with asyncio.timeout(10):
        return [token_id async for delta in live.deltas() for token_id in delta.token_ids]


@pytest.mark.parametrize("max_reply_bytes", [None, 10_000], ids=["streamed", "unary"])
async def test_news_in_the_batch_of_anothers_fault_arrive(
    front_end: FrontEnd, engine: QuietEngine, max_reply_bytes: int | None
) -> None:
    bad = await open_request(front_end, num_choices=2, stop_strings=["never"])
    good = [
        await open_request(front_end, stop_strings=stops, max_reply_bytes=max_reply_bytes) for stops in ([], ["never"])
    ]
    first, second = (live.first_handle for live in good)
    ends = [SequenceEnd(handle, FinishReason.LENGTH, 0) for handle in (1, first, second)]
    front_end.on_outputs(OutputBatch([0, 1, first, second], [POISON, 40, 41, 42], [], ends))
    assert [await read(live) for live in good] == [[41], [42]]
    with pytest.raises(TextFailed):
        await read(bad)
    assert engine.closed == [bad.first_handle]


async def test_a_report_that_fits_no_buffer_ends_its_request(front_end: FrontEnd, engine: QuietEngine) -> None:
    bad, good = [await open_request(front_end, num_logprobs=1) for _ in range(2)]
    reports = [(0, RowLogprobs(0, -1.0, (2**40,), (-1.0,))), (1, RowLogprobs(0, -1.0, (5,), (-1.0,)))]
    ends = [SequenceEnd(handle, FinishReason.LENGTH, 0) for handle in (0, 1)]
    front_end.on_outputs(OutputBatch([0, 1], [40, 41], reports, ends))
    assert await read(good) == [41]
    with pytest.raises(TextFailed):
        await read(bad)


async def test_an_error_of_the_engine_comes_after_what_came_before_it(front_end: FrontEnd) -> None:
    live = await open_request(front_end)
    front_end.on_outputs(OutputBatch([0], [40]))
    end = SequenceEnd(0, FinishReason.ERROR, 0, error=WorkerUnavailable("gone"))
    front_end.on_outputs(OutputBatch([], [], [], [end]))
    deltas = live.deltas()
    assert list((await anext(deltas)).token_ids) == [40]
    with pytest.raises(WorkerUnavailable):
        await anext(deltas)


async def test_a_stop_token_has_no_text_where_another_choice_fails_in_its_step(front_end: FrontEnd) -> None:
    first, second = embedded().encode("Good morrow").ids[:2]
    live = await open_request(front_end, num_choices=2, stop_token_ids=[second])
    front_end.on_outputs(OutputBatch([0, 1], [first, first]))
    ends = [
        SequenceEnd(0, FinishReason.ERROR, 0, error=WorkerUnavailable("gone")),
        SequenceEnd(1, FinishReason.STOP, 0, stop_token_id=second),
    ]
    front_end.on_outputs(OutputBatch([1], [second], [], ends))
    texts = ["", ""]
    with pytest.raises(WorkerUnavailable):
        async for delta in live.deltas():
            texts[delta.choice_index] += delta.text
    assert texts == [embedded().decode([first])] * 2


async def test_much_that_is_unread_leaves_in_bounded_deltas_with_the_end_in_the_last(front_end: FrontEnd) -> None:
    tokenizer = embedded()
    ids = tokenizer.encode("Good morrow, cousin. " * 100).ids
    live = await open_request(front_end)
    front_end.on_outputs(OutputBatch([0] * len(ids), ids))
    front_end.on_outputs(OutputBatch([0], [0], [], [SequenceEnd(0, FinishReason.STOP, 0, stop_token_id=0)]))
    deltas = [delta async for delta in live.deltas()]
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [*ids, 0]
    assert [delta.end is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert max(len(delta.token_ids) for delta in deltas) <= MAX_TOKENS_PER_DELTA


@pytest.mark.parametrize("max_reply_bytes", [None, 2000], ids=["streamed", "unary"])
async def test_text_that_gathers_counts_too(
    front_end: FrontEnd, max_reply_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stop strings text is made as tokens come, and a token's text may be much larger than its id."""
    monkeypatch.setattr(live_request, "MAX_UNREAD_BYTES", 2000)
    vocabulary = embedded().get_vocab()
    longest = max((token for token in vocabulary if not token.startswith("<|")), key=len)
    live = await open_request(front_end, stop_strings=["never"], max_reply_bytes=max_reply_bytes)
    num_tokens = 2000 // len(longest) + 2
    front_end.on_outputs(OutputBatch([0] * num_tokens, [vocabulary[longest]] * num_tokens))
    with pytest.raises(OutputTooLarge):
        await read(live)
    # Output that is read makes room.
    live = await open_request(front_end, stop_strings=["never"])
    deltas = live.deltas()
    for _ in range(5):
        front_end.on_outputs(OutputBatch([1] * 100, [vocabulary[longest]] * 100))
        for _ in range(2):
            await anext(deltas)
    assert live.num_unread_characters == live.num_unread_tokens == 0


def unread(live: LiveRequest) -> tuple[int, int]:
    return live.num_unread_tokens, live.num_unread_characters


@pytest.mark.parametrize("max_reply_bytes", [None, 10_000], ids=["streamed", "unary"])
async def test_tokens_past_a_stop_string_are_not_unread(front_end: FrontEnd, max_reply_bytes: int | None) -> None:
    """A front end that was behind gets several steps in one batch, whose last tokens are past the stop."""
    ids = embedded().encode("a b c d e f").ids
    live = await open_request(
        front_end, num_choices=2, stop_strings=["b"], num_logprobs=0, max_reply_bytes=max_reply_bytes
    )
    reports = [(handle, RowLogprobs(token_id, -1.0, (), ())) for handle in (0, 1) for token_id in ids]
    front_end.on_outputs(OutputBatch([0] * len(ids) + [1] * len(ids), ids * 2, reports))
    held = [len(choice.token_ids) for choice in live.choices]
    assert 0 < sum(held) < 2 * len(ids)
    assert live.num_unread_tokens == sum(held)
    front_end.on_outputs(OutputBatch([], [], [], [SequenceEnd(handle, FinishReason.ABORT, 0) for handle in (0, 1)]))
    assert len(await read(live)) == sum(held)
    assert unread(live) == (0, 0)


@pytest.mark.parametrize("max_reply_bytes", [None, 10_000], ids=["streamed", "unary"])
@pytest.mark.parametrize("ending", ["length", "engine's error", "no text", "cancelled", "unread"])
async def test_nothing_is_unread_after_the_end(front_end: FrontEnd, ending: str, max_reply_bytes: int | None) -> None:
    stops = [] if ending == "no text" else ["never"]
    live = await open_request(front_end, num_choices=2, stop_strings=stops, max_reply_bytes=max_reply_bytes)
    tokens = [POISON if ending == "no text" else 40] * 100
    error = WorkerUnavailable("gone") if ending == "engine's error" else None
    reason = FinishReason.ERROR if error else FinishReason.LENGTH
    reader = asyncio.create_task(read(live))
    front_end.on_outputs(OutputBatch([0] * 100, tokens))
    if ending == "cancelled":
        await asyncio.sleep(0.01)
        reader.cancel()
    if ending == "unread":
        reader.cancel()
        await asyncio.wait([reader])
    front_end.on_outputs(OutputBatch([1] * 100, tokens))
    assert live.num_unread_tokens >= 100
    front_end.on_outputs(OutputBatch([], [], [], [SequenceEnd(n, reason, 0, error=error) for n in (0, 1)]))
    await asyncio.gather(reader, return_exceptions=True)
    if ending == "length":
        assert unread(live) == (0, 0)
    live.close()
    assert unread(live) == (0, 0)
    assert not any(choice.token_ids for choice in live.choices)


async def test_what_is_dropped_while_a_thread_takes_it_is_the_requests_error(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_taking, may_go_on = threading.Event(), threading.Event()

    class Waiting(TextDecoder):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            is_taking.set()
            may_go_on.wait(30)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    front_end.decoder = Waiting(embedded())
    live = await open_request(front_end, max_reply_bytes=100_000)
    end = SequenceEnd(0, FinishReason.LENGTH, 0)
    front_end.on_outputs(OutputBatch([0] * MIN_IDS_WITHOUT_GIL, [40] * MIN_IDS_WITHOUT_GIL, [], [end]))
    reader = asyncio.create_task(read(live))
    while not is_taking.is_set():
        await asyncio.sleep(0.001)
    other = await open_request(front_end)
    # All requests together hold too much.
    monkeypatch.setattr(front_end_module, "MAX_UNREAD_BYTES", MIN_IDS_WITHOUT_GIL)
    monkeypatch.setattr(front_end_module, "COUNT_EVERY_BYTES", 1)
    front_end.on_outputs(OutputBatch([other.first_handle], [40]))
    may_go_on.set()
    with pytest.raises(OutputTooLarge):
        await reader
    assert unread(live) == (0, 0)


PROMPT_TOP = 2


def prompt_report(first: int, end: int) -> PromptLogprobs:
    """A report that says of each position which one it is."""
    positions = range(first, end)
    top = tuple(position for position in positions for _ in range(PROMPT_TOP))
    return prompt_logprobs(0, first, [-float(p) for p in positions], positions, PROMPT_TOP, top, top)


@pytest.mark.parametrize("max_reply_bytes", [None, 100_000], ids=["streamed", "unary"])
async def test_a_prompts_reports_come_in_order_before_all_else(
    front_end: FrontEnd, max_reply_bytes: int | None
) -> None:
    prompt = list(range(100, 300))
    live = await open_request(
        front_end,
        prompt_token_ids=prompt,
        num_prompt_logprobs=PROMPT_TOP,
        num_choices=2,
        max_reply_bytes=max_reply_bytes,
    )
    deltas = live.deltas()
    front_end.on_outputs(OutputBatch(prompt_logprobs=[(0, prompt_report(1, 90))]))
    if max_reply_bytes is None:
        assert (await anext(deltas)).is_prompt
    ends = [SequenceEnd(handle, FinishReason.LENGTH, 0) for handle in (0, 1)]
    reports = [(0, prompt_report(90, 120)), (0, prompt_report(120, 200))]
    front_end.on_outputs(OutputBatch([1, 0], [40, 41], [], ends, reports))
    rest = [delta async for delta in deltas]
    assert live.num_unread_bytes == 0
    told = [delta for delta in rest if delta.is_prompt]
    assert [delta.is_prompt for delta in rest] == [True] * len(told) + [False] * 2
    first = 200 - sum(len(delta.token_ids) for delta in told)
    assert first == (1 if max_reply_bytes else 65)
    positions = range(first, 200)
    assert [token_id for delta in told for token_id in delta.token_ids] == [prompt[p] for p in positions]
    assert [each.rank for delta in told for each in delta.logprobs] == list(positions)
    if max_reply_bytes is None:
        assert max(len(delta.token_ids) for delta in told) <= MAX_TOKENS_PER_DELTA


async def test_a_prompts_reports_that_nobody_reads_are_counted_and_dropped(
    front_end: FrontEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_request, "MAX_UNREAD_BYTES", 3000)
    live = await open_request(front_end, prompt_token_ids=[1] * 500, num_prompt_logprobs=PROMPT_TOP)
    front_end.on_outputs(OutputBatch(prompt_logprobs=[(0, prompt_report(1, 101))]))
    assert live.num_unread_bytes == 2600
    front_end.on_outputs(OutputBatch(prompt_logprobs=[(0, prompt_report(101, 201))]))
    assert live.num_unread_bytes == 0
    with pytest.raises(OutputTooLarge):
        await read(live)


async def test_a_gap_in_a_prompts_reports_ends_the_request(front_end: FrontEnd, engine: QuietEngine) -> None:
    live = await open_request(front_end, prompt_token_ids=[1] * 500, num_prompt_logprobs=PROMPT_TOP)
    front_end.on_outputs(OutputBatch(prompt_logprobs=[(0, prompt_report(1, 5)), (0, prompt_report(6, 9))]))
    with pytest.raises(TextFailed):
        await read(live)
    assert engine.closed == [0]


async def test_messages_with_many_long_tokens_have_fewer_of_them(front_end: FrontEnd) -> None:
    """64 places of 41 tokens, of 128 bytes each, would be 1.5 MB."""
    front_end.decoder.speller.longest = 128
    ids = list(range(20))
    live = await open_request(front_end, num_logprobs=20, logprob_token_ids=ids)
    report = RowLogprobs(0, -1.0, tuple(ids), (-1.0,) * 20, 1, (-1.0,) * 20)
    front_end.on_outputs(OutputBatch([0] * 100, [40] * 100, [(0, report)] * 100))
    deltas = live.deltas()
    assert [len((await anext(deltas)).token_ids) for _ in range(3)] == [47, 47, 6]


def test_the_vocabulary_is_read_once_at_the_start() -> None:
    tokenizer = CountingTokenizer(embedded())
    FrontEnd(tokenizer, set_ready)
    assert tokenizer.num_reads == embedded().get_vocab_size()
