"""Incremental text against the tokenizer's own decode of the whole, and stop strings against a plain search."""

import asyncio
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem_scheduler.front_end.text.detokenizer import (
    DECODING_THREADS,
    MIN_IDS_WITHOUT_GIL,
    UNFINISHED,
    Detokenizer,
    TextDecoder,
)
from tandem_scheduler.front_end.text.stop_strings import START, StopStrings
from tests.support.tokenizers import CountingTokenizer, byte_fallback, embedded

TOKENIZER = embedded()
DECODER = TextDecoder(TOKENIZER)
VOCAB_SIZE = TOKENIZER.get_vocab_size()
END_OF_TEXT = 0

any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30)
# Mostly parts of characters of several bytes, complete and broken.
byte_ids = st.lists(st.sampled_from([TOKENIZER.encode(c).ids[i] for c in "é€😀" for i in range(2)] + [END_OF_TEXT, 40]))
texts = st.text(max_size=40)


def joined(
    ids: list[int], stops: tuple[str, ...] = (), *, skip: bool = True, decoder: TextDecoder = DECODER
) -> tuple[str, str | None, int]:
    """The joined deltas, the stop string that matched, and the number of ids that were read."""
    detokenizer = Detokenizer(decoder, StopStrings(stops), skip_special_tokens=skip)
    text = ""
    for count, token_id in enumerate(ids, start=1):
        text += detokenizer.add(token_id)
        if detokenizer.matched_stop is not None:
            return text, detokenizer.matched_stop, count
    return text + detokenizer.finish(), detokenizer.matched_stop, len(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.one_of(any_ids, byte_ids), num_added=st.integers(0, 30))
@example(ids=TOKENIZER.encode("😀").ids, num_added=1)
def test_tokens_left_to_the_end_give_the_same_text(ids: list[int], num_added: int) -> None:
    detokenizer = Detokenizer(DECODER, skip_special_tokens=True)
    text = "".join(map(detokenizer.add, ids[:num_added])) + detokenizer.finish(ids[num_added:])
    assert text == TOKENIZER.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.one_of(any_ids, byte_ids, texts.map(lambda text: TOKENIZER.encode(text).ids)), skip=st.booleans())
@example(ids=TOKENIZER.encode("😀").ids[:-1], skip=True)
@example(ids=[END_OF_TEXT, END_OF_TEXT], skip=False)
def test_joined_deltas_are_the_decoded_whole(ids: list[int], skip: bool) -> None:
    assert joined(ids, skip=skip)[0] == TOKENIZER.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc ", min_size=1, max_size=40), stops=st.lists(st.text("abc ", min_size=1, max_size=5), max_size=3)
)
def test_text_ends_before_the_first_stop_string_that_completes(text: str, stops: list[str]) -> None:
    ids = TOKENIZER.encode(text).ids
    got, matched, count = joined(ids, tuple(stops))
    ends = sorted((text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text)
    if not ends:
        assert (got, matched, count) == (text, None, len(ids))
        return
    _, start, stop = ends[0]
    assert (got, matched) == (text[:start], stop)
    # The match is found at the very token that completes it.
    assert stop in TOKENIZER.decode(ids[:count]) and stop not in TOKENIZER.decode(ids[: count - 1])


LETTERS = {character: TOKENIZER.encode(character).ids for character in "abc "}


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc ", min_size=1, max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=5), max_size=3),
    min_tokens=st.integers(0, 20),
    is_included=st.booleans(),
)
@example(text="aabb", stops=["ab"], min_tokens=2, is_included=True)
@example(text="ababab", stops=["ab"], min_tokens=4, is_included=False)
def test_a_stop_string_counts_if_a_token_after_min_tokens_completes_it(
    text: str, stops: list[str], min_tokens: int, is_included: bool
) -> None:
    """Each token is one character."""
    detokenizer = Detokenizer(
        DECODER,
        StopStrings(stops),
        skip_special_tokens=True,
        include_stop_string=is_included,
        min_tokens=min_tokens,
    )
    parts = []
    for character in text:
        [token_id] = LETTERS[character]
        parts.append(detokenizer.add(token_id))
        if detokenizer.matched_stop is not None:
            break
    num_read = len(parts)
    parts.append(detokenizer.finish())
    for end in range(min_tokens + 1, len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(complete, key=len)
            expected = text[:end] if is_included else text[: end - len(stop)]
            assert ("".join(parts), detokenizer.matched_stop, num_read) == (expected, stop, end)
            return
    assert ("".join(parts), detokenizer.matched_stop) == (text, None)


def test_what_comes_out_at_the_end_is_no_stop_string_before_min_tokens() -> None:
    """An incomplete character becomes text when the output ends."""
    [first, _] = TOKENIZER.encode("é").ids
    for min_tokens, matched in ((0, UNFINISHED), (1, None)):
        detokenizer = Detokenizer(DECODER, StopStrings([UNFINISHED]), skip_special_tokens=True, min_tokens=min_tokens)
        text = detokenizer.add(first) + detokenizer.finish()
        assert (text, detokenizer.matched_stop) == ("" if matched else UNFINISHED, matched)


@pytest.mark.parametrize(
    ("deltas", "stops", "expected"),
    [
        ("ab", ("bc",), ["a", "", "b"]),
        ("abd", ("bc",), ["a", "", "bd", ""]),
        ("aab", ("aac",), ["", "", "aab", ""]),
    ],
)
def test_only_what_may_start_a_stop_string_is_held_back(
    deltas: str, stops: tuple[str, ...], expected: list[str]
) -> None:
    detokenizer = Detokenizer(DECODER, StopStrings(stops), skip_special_tokens=True)
    got = [detokenizer.add(TOKENIZER.encode(character).ids[0]) for character in deltas]
    assert [*got, detokenizer.finish()] == expected


def test_an_incomplete_character_is_held_back_until_it_is_whole() -> None:
    ids = TOKENIZER.encode("é").ids
    assert len(ids) == 2
    detokenizer = Detokenizer(DECODER, skip_special_tokens=True)
    assert [detokenizer.add(token_id) for token_id in ids] == ["", "é"]


GARBAGE = [TOKENIZER.token_to_id(character) for character in "ðŁĺģÃÂĀ"] + [TOKENIZER.token_to_id("a"), END_OF_TEXT]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from(GARBAGE), max_size=100), skip=st.booleans())
@example(ids=GARBAGE[:1] * 100, skip=True)
@example(ids=TOKENIZER.encode("é").ids[:1] * 50 + TOKENIZER.encode("é").ids, skip=True)
def test_bytes_that_are_no_text_come_out_as_the_decoded_whole(ids: list[int], skip: bool) -> None:
    assert joined(ids, skip=skip)[0] == TOKENIZER.decode(ids, skip_special_tokens=skip)


def test_bytes_that_are_no_text_are_not_decoded_again_and_again() -> None:
    """A model may give nothing else. The uncertain part stays short, so the cost of a token does not grow."""
    num_decoded: list[int] = []

    class Counting(TextDecoder):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            num_decoded.append(len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    ids = [GARBAGE[0], GARBAGE[1], GARBAGE[0]] * 100
    assert joined(ids, decoder=Counting(TOKENIZER))[0] == TOKENIZER.decode(ids)
    assert max(num_decoded) <= 32


FALLBACK = byte_fallback()
FALLBACK_DECODER = TextDecoder(FALLBACK)
SMILE = [FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
A_BYTE, BROKEN, A_WORD, SPACE = (FALLBACK.token_to_id(token) for token in ("<0x61>", "<0xFF>", "▁a", "▁"))
fallback_ids = st.lists(
    st.one_of(st.integers(0, FALLBACK.get_vocab_size() - 1), st.integers(0, 8), st.sampled_from([*SMILE, A_BYTE])),
    max_size=30,
)


@settings(max_examples=500, deadline=None)
@given(ids=fallback_ids, num_added=st.integers(0, 30), skip=st.booleans())
# DecodeStream raises 'Invalid prefix' here: a byte that was text by itself is no text in a longer run.
@example(ids=[A_BYTE, BROKEN, A_BYTE, A_WORD], num_added=4, skip=True)
@example(ids=[*SMILE, 0, *SMILE[:2], 0, *SMILE[2:], A_WORD], num_added=30, skip=True)
@example(ids=[SPACE, A_WORD, 0, A_WORD, 0, SPACE, SMILE[0]], num_added=30, skip=True)
@example(ids=[8, A_WORD, 8, 8, A_BYTE, 8], num_added=5, skip=False)
def test_byte_fallback_gives_the_decoded_whole(ids: list[int], num_added: int, skip: bool) -> None:
    detokenizer = Detokenizer(FALLBACK_DECODER, skip_special_tokens=skip)
    text = "".join(map(detokenizer.add, ids[:num_added])) + detokenizer.finish(ids[num_added:])
    assert text == FALLBACK.decode(ids, skip_special_tokens=skip)


def test_byte_fallback_streams_a_character_once_its_run_has_ended() -> None:
    detokenizer = Detokenizer(FALLBACK_DECODER, skip_special_tokens=True)
    assert [detokenizer.add(token_id) for token_id in (A_WORD, *SMILE, A_WORD)] == ["a", "", "", "", "", "😀 a"]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.text("ab", max_size=6)), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=8))
def test_stop_strings_are_found_as_by_a_plain_search(parts: list[str], stops: list[str]) -> None:
    automaton, node, text = StopStrings(stops), START, "".join(parts)
    found = None
    read = ""
    for part in parts:
        node, stop, end = automaton.find(part, node)
        read += part[:end]
        if stop is not None:
            found = (len(read), len(read) - len(stop), stop)
            break
        longest = max((n for s in stops for n in range(len(s)) if read.endswith(s[:n])), default=0)
        assert automaton.held(node) == longest
    assert found == min(((text.index(s) + len(s), text.index(s), s) for s in stops if s in text), default=None)


@settings(max_examples=200, deadline=None)
@given(ids=any_ids, skip=st.booleans())
def test_a_texts_least_size_is_known_from_its_ids(ids: list[int], skip: bool) -> None:
    size = DECODER.min_text_bytes(np.array(ids, np.int32), skip_special_tokens=skip)
    text = TOKENIZER.decode(ids, skip_special_tokens=skip)
    assert size <= len(text.encode())
    if UNFINISHED not in text:
        assert size == len(text.encode())


def test_the_vocabulary_is_read_at_the_start_and_by_no_call() -> None:
    """Reading Qwen3's vocabulary takes over 100 ms, for which all calls of a server would wait."""
    tokenizer = CountingTokenizer(TOKENIZER)
    decoder = TextDecoder(tokenizer)
    num_reads = tokenizer.num_reads
    assert num_reads == VOCAB_SIZE
    assert decoder.min_text_bytes(np.array([40], np.int32), skip_special_tokens=True) == len(TOKENIZER.decode([40]))
    assert tokenizer.num_reads == num_reads


async def test_nothing_holds_ids_whose_call_was_cancelled_while_it_waited() -> None:
    may_go_on = threading.Event()

    class Waiting(TextDecoder):
        def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
            may_go_on.wait(30)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    decoder, ids = Waiting(TOKENIZER), [40] * MIN_IDS_WITHOUT_GIL
    running = [
        asyncio.create_task(decoder.decode_away(list(ids), skip_special_tokens=True)) for _ in range(DECODING_THREADS)
    ]
    await asyncio.sleep(0.01)
    num_references = sys.getrefcount(ids)
    tasks = [asyncio.create_task(decoder.decode_away(ids, skip_special_tokens=True)) for _ in range(64)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    del tasks, task
    assert sys.getrefcount(ids) == num_references
    may_go_on.set()
    assert await asyncio.gather(*running) == [TOKENIZER.decode(ids)] * DECODING_THREADS
