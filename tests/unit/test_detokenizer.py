"""Incremental text against the tokenizer's own decode of the whole, and stop strings against a plain search."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from scheduler_service.detokenizer import Detokenizer
from shared.model_folder import TOKENIZER_FILES, resolve_model

TOKENIZER = Tokenizer.from_file(str(resolve_model("embedded", TOKENIZER_FILES) / "tokenizer.json"))
VOCAB_SIZE = TOKENIZER.get_vocab_size()
END_OF_TEXT = 0

any_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=30)
# Mostly bytes of several-byte characters, whole and broken.
byte_ids = st.lists(st.sampled_from([TOKENIZER.encode(c).ids[i] for c in "é€😀" for i in range(2)] + [END_OF_TEXT, 40]))
texts = st.text(max_size=40)


def joined(ids: list[int], stops: tuple[str, ...] = (), *, skip: bool = True) -> tuple[str, str | None, int]:
    """The deltas' sum, the stop that matched, and the number of ids read."""
    detokenizer = Detokenizer(TOKENIZER, stops, skip_special_tokens=skip)
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
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
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
    # Told at the very token that completes it.
    assert stop in TOKENIZER.decode(ids[:count]) and stop not in TOKENIZER.decode(ids[: count - 1])


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
    detokenizer = Detokenizer(TOKENIZER, stops, skip_special_tokens=True)
    got = [detokenizer.add(TOKENIZER.encode(character).ids[0]) for character in deltas]
    assert [*got, detokenizer.finish()] == expected


def test_an_incomplete_character_is_held_back_until_it_is_whole() -> None:
    ids = TOKENIZER.encode("é").ids
    assert len(ids) == 2
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=True)
    assert [detokenizer.add(token_id) for token_id in ids] == ["", "é"]
