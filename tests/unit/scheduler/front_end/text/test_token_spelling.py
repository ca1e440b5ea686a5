"""Single tokens' bytes and text, against the text that they were made of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from tandem_scheduler.front_end.text.detokenizer import TextDecoder
from tests.support.tokenizers import byte_fallback, embedded, qwen3_like

EMBEDDED, QWEN3_LIKE = embedded(), qwen3_like()
SPELLER, QWEN3_SPELLER = TextDecoder(EMBEDDED).speller, TextDecoder(QWEN3_LIKE).speller


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_the_bytes_of_a_texts_tokens_joined_are_the_text(text: str) -> None:
    text += " <|im_end|><think>"
    assert b"".join(SPELLER.spell(token_id)[0] for token_id in EMBEDDED.encode(text).ids) == text.encode()
    # This one normalises.
    ids = QWEN3_LIKE.encode(text).ids
    assert b"".join(QWEN3_SPELLER.spell(token_id)[0] for token_id in ids).decode() == QWEN3_LIKE.decode(
        ids, skip_special_tokens=False
    )


@pytest.mark.parametrize("tokenizer", [EMBEDDED, byte_fallback()], ids=["byte-level", "byte fallback"])
def test_every_token_has_text_and_none_is_longer_than_is_said(tokenizer: Tokenizer) -> None:
    speller = TextDecoder(tokenizer).speller
    for token_id in range(tokenizer.get_vocab_size()):
        spelled, text = speller.spell(token_id)
        assert 0 < len(spelled) <= speller.longest
        assert text == spelled.decode(errors="replace") and len(text.encode()) <= 3 * len(spelled)
        if "\ufffd" not in text and tokenizer is EMBEDDED:
            assert text == tokenizer.decode([token_id], skip_special_tokens=False)


def test_an_id_that_pads_the_vocabulary_has_no_bytes() -> None:
    assert SPELLER.spell(5000) == (b"", "")


def test_a_byte_level_decoder_among_others_is_one() -> None:
    tokenizer = embedded()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    speller = TextDecoder(tokenizer).speller
    assert b"".join(speller.spell(token_id)[0] for token_id in tokenizer.encode(" the é").ids) == " the é".encode()


def test_tokens_of_a_vocabulary_with_byte_fallback_are_what_they_add_to_a_text() -> None:
    tokenizer = byte_fallback()
    speller = TextDecoder(tokenizer).speller
    spelled = {name: speller.spell(tokenizer.token_to_id(name)) for name in ("▁a", "é", "</s>", "<0x61>", "<0xFF>")}
    assert spelled == {
        "▁a": (b" a", " a"),
        "é": ("é".encode(), "é"),
        "</s>": (b"</s>", "</s>"),
        "<0x61>": (b"a", "a"),
        "<0xFF>": (b"\xff", "\ufffd"),
    }
