"""Limits on tokenizing: which texts are refused unread or read in pieces, which wait, and which errors come."""

import asyncio
import sys
import threading

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from tandem_scheduler.front_end.text import encoder as text_encoder
from tandem_scheduler.front_end.text.encoder import INLINE_CHARACTERS, PIECE_CHARACTERS, TextEncoder
from tandem_shared.errors import InvalidRequest, QueueFull, TextFailed
from tests.support.tokenizers import PanicException, WatchedTokenizer, embedded, qwen3_like

SHORT = "Good morrow, cousin. " * 100
LONG = "Good morrow, cousin. " * 10_000
assert INLINE_CHARACTERS < len(SHORT) < PIECE_CHARACTERS < len(LONG)
NO_LIMIT = 10**9


@pytest.mark.parametrize("text", ["", "words", SHORT, LONG, LONG + "x" * 100_000 + LONG], ids=len)
async def test_ids_are_the_tokenizers_own(text: str) -> None:
    for tokenizer in (embedded(), qwen3_like()):
        ids = await TextEncoder(tokenizer).encode("text", text, max_tokens=NO_LIMIT)
        assert ids.tolist() == tokenizer.encode(text).ids


async def test_a_text_that_must_be_too_many_tokens_is_refused_unread() -> None:
    watched = WatchedTokenizer(embedded())
    encoder = TextEncoder(watched)
    longest = max(map(len, embedded().get_vocab()))
    for text in ("x" * (100 * longest + 1), "é" * (50 * longest + 1)):
        with pytest.raises(InvalidRequest, match="are over 100 tokens"):
            await encoder.encode("text", text, max_tokens=100)
    assert watched.texts == []


async def test_no_text_that_fits_is_refused_unread() -> None:
    """The longest texts of so many tokens: repeats of the longest token, and of the character that NFC shrinks most."""
    longest = max((t for t in embedded().get_vocab() if t.isascii()), key=len)
    shrunk = "\u1fbe\u0308\u0301" * 50
    for tokenizer, text in ((embedded(), longest * 50), (qwen3_like(), longest * 50), (qwen3_like(), shrunk)):
        count = len(tokenizer.encode(text).ids)
        assert len(await TextEncoder(tokenizer).encode("text", text, max_tokens=count)) == count


async def test_a_long_text_is_read_in_pieces_and_no_further_than_its_limit() -> None:
    watched = WatchedTokenizer(embedded())
    with pytest.raises(InvalidRequest, match="over the 20000 that"):
        await TextEncoder(watched).encode("text", LONG, max_tokens=20_000)
    assert max(map(len, watched.texts)) <= PIECE_CHARACTERS
    assert len("".join(watched.texts)) < len(LONG) / 2 and LONG.startswith("".join(watched.texts))


async def test_a_long_text_with_no_place_to_cut_is_refused_unread() -> None:
    watched = WatchedTokenizer(embedded())
    with pytest.raises(InvalidRequest, match="without a space"):
        await TextEncoder(watched).encode("text", "x" * 300_000, max_tokens=NO_LIMIT)
    assert watched.texts == []


async def test_a_tokenizer_that_is_not_known_reads_a_text_whole() -> None:
    tokenizer = unknown_tokenizer()
    watched = WatchedTokenizer(tokenizer)
    ids = await TextEncoder(watched).encode("text", LONG, max_tokens=NO_LIMIT)
    assert watched.texts == [LONG] and ids.tolist() == tokenizer.encode(LONG).ids


async def test_a_short_text_does_not_wait_for_long_ones() -> None:
    may_go_on = threading.Event()

    def wait_if_long(text: str) -> None:
        if len(text) > len(SHORT):
            may_go_on.wait(30)

    watched = WatchedTokenizer(embedded(), wait_if_long)
    encoder = TextEncoder(watched)
    long_ones = [asyncio.create_task(encoder.encode("text", LONG, max_tokens=NO_LIMIT)) for _ in range(5)]
    while not watched.texts:
        await asyncio.sleep(0.001)
    for text in ("words", SHORT):
        assert (await encoder.encode("text", text, max_tokens=NO_LIMIT)).tolist() == embedded().encode(text).ids
    assert not any(task.done() for task in long_ones)
    may_go_on.set()
    assert all(len(ids) for ids in await asyncio.gather(*long_ones))


async def test_too_much_text_at_once_is_refused_and_taken_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "MAX_BYTES_AT_ONCE", 2 * len(LONG))
    may_go_on = threading.Event()
    encoder = TextEncoder(WatchedTokenizer(embedded(), lambda text: may_go_on.wait(30) and None))
    tasks = [asyncio.create_task(encoder.encode("text", LONG, max_tokens=NO_LIMIT)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await encoder.encode("text", LONG, max_tokens=NO_LIMIT)
    tasks[0].cancel()
    may_go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(await encoder.encode("text", LONG, max_tokens=NO_LIMIT))


def unknown_tokenizer() -> Tokenizer:
    """A tokenizer whose texts can't be split."""
    tokenizer = embedded()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("tokenizer", [embedded(), unknown_tokenizer()], ids=["split", "whole"])
async def test_nothing_holds_a_text_whose_call_was_cancelled_while_it_waited(tokenizer: Tokenizer) -> None:
    may_go_on = threading.Event()
    watched = WatchedTokenizer(tokenizer, lambda text: may_go_on.wait(30) and None)
    encoder = TextEncoder(watched)
    running = [asyncio.create_task(encoder.encode("text", text, max_tokens=NO_LIMIT)) for text in (SHORT, LONG)]
    while len(watched.texts) < 2:
        await asyncio.sleep(0.001)
    for waiting_text in ("a" + SHORT, "a" + LONG):
        num_references = sys.getrefcount(waiting_text)
        tasks = [asyncio.create_task(encoder.encode("text", waiting_text, max_tokens=NO_LIMIT)) for _ in range(20)]
        await asyncio.sleep(0.01)
        assert sys.getrefcount(waiting_text) > num_references
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del tasks, task
        assert sys.getrefcount(waiting_text) == num_references
    may_go_on.set()
    for text, ids in zip((SHORT, LONG), await asyncio.gather(*running), strict=True):
        assert ids.tolist() == tokenizer.encode(text).ids


async def test_a_text_counts_until_it_is_read_though_its_call_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "MAX_BYTES_AT_ONCE", 2 * len(LONG))
    may_go_on = threading.Event()
    tokenizer = unknown_tokenizer()
    watched = WatchedTokenizer(tokenizer, lambda text: may_go_on.wait(30) and None)
    encoder = TextEncoder(watched)
    running = asyncio.create_task(encoder.encode("text", LONG, max_tokens=NO_LIMIT))
    while not watched.texts:
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    waiting = asyncio.create_task(encoder.encode("text", LONG, max_tokens=NO_LIMIT))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await asyncio.wait_for(encoder.encode("text", LONG, max_tokens=NO_LIMIT), 5)
    may_go_on.set()
    expected = tokenizer.encode(LONG).ids
    assert (await waiting).tolist() == expected
    # The cancelled texts no longer count, so as much as is allowed at once is accepted.
    for ids in await asyncio.gather(*(encoder.encode("text", LONG, max_tokens=NO_LIMIT) for _ in range(2))):
        assert ids.tolist() == expected


@pytest.mark.parametrize("text", ["words", SHORT, LONG], ids=len)
async def test_a_panic_of_the_tokenizer_is_an_error_of_the_call(text: str) -> None:
    def panic(text: str) -> None:
        raise PanicException("x" * 10_000)

    with pytest.raises(TextFailed) as caught:
        await TextEncoder(WatchedTokenizer(embedded(), panic)).encode("text", text, max_tokens=NO_LIMIT)
    assert len(str(caught.value)) < 300


async def test_an_interrupt_is_no_error_of_the_call() -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await TextEncoder(WatchedTokenizer(embedded(), interrupt)).encode("text", "words", max_tokens=NO_LIMIT)


async def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not Unicode"):
        await TextEncoder(embedded()).encode("text", "a\ud800b", max_tokens=NO_LIMIT)
