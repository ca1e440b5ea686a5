"""Grammars for llguidance: they accept what Python's own judges accept, and bad and costly ones are refused in time."""

import itertools
import json
import re
import threading
import time

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from tandem_shared import structured_output
from tandem_shared.structured_output import (
    MAX_COPIES,
    GrammarCompiler,
    GrammarError,
    MatcherThreads,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from tests.support.tokenizers import EMBEDDED, byte_fallback, embedded

VOCAB, PADDED, EOS = 1024, 1100, (1017, 1015)
TOKENIZER = embedded()
COMPILER = GrammarCompiler(EMBEDDED.read_bytes(), PADDED, EOS)


def accepts(grammar: str, text: str) -> bool:
    """Whether the text may be the whole output."""
    matcher = COMPILER.matcher(grammar)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def allowed(matcher: structured_output.Matcher) -> set[int]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    assert not matcher.is_error()
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


@pytest.mark.parametrize("regex", ["a(b|c)*", "(ab)?c+", "[^a]b?|a.", "a/b", r"\w{2}", "(|a)(|b)c{1,2}", 'a"b|"\\\\'])
def test_a_regex_matches_the_whole_output(regex: str) -> None:
    grammar = regex_grammar(regex)
    texts = ["".join(text) for n in range(4) for text in itertools.product('abc/"\\', repeat=n)]
    found = [text for text in texts if accepts(grammar, text)]
    assert found == [text for text in texts if re.fullmatch(regex, text)]
    assert found


def test_a_choice_is_one_of_its_texts() -> None:
    texts = [
        "yes",
        "no",
        "yes and no",
        'a "b" \\ c',
        "line\nbreak\ttab",
        "nul\0",
        "ünï 日本 😀",
        "%json /x/ ${y}",
        "\x7f ",
    ]
    grammar = choice_grammar(texts)
    for text in [*texts, "", "y", "yes ", "nos", "line", "ünï"]:
        assert accepts(grammar, text) == (text in texts), text


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_accepts_what_is_valid() -> None:
    grammar = json_schema_grammar(json.dumps(PERSON))
    values = [{"name": "x", "age": 1}, {"name": '日\n"', "age": 70}, {"name": "x"}, {"name": "x", "age": -1}, [], {}]
    for value in [*values, {"name": 1, "age": 1}, {"name": "x", "age": 1, "z": 1}]:
        is_valid = jsonschema.Draft202012Validator(PERSON).is_valid(value)
        for indent in (None, 2):
            # Characters that JSON need not escape are not escaped.
            text = json.dumps(value, indent=indent, ensure_ascii=False)
            assert accepts(grammar, text) == is_valid, text
    assert accepts(json_object_grammar(), '{"a": [1, {"b": null}], "c": "x"}')
    assert not accepts(json_object_grammar(), "[1]")


@pytest.mark.parametrize(
    ("between", "is_allowed"),
    [("", True), (" ", True), ("  ", False), ("\n" + 40 * " ", True), ("\n" + 41 * " ", False)],
)
def test_whitespace_is_bounded(between: str, is_allowed: bool) -> None:
    assert accepts(json_schema_grammar('{"type": "array"}'), f"[{between}1]") == is_allowed
    # A schema can't ask for more.
    assert (
        accepts(json_schema_grammar('{"type": "array", "x-guidance": {"whitespace_pattern": ".*"}}'), f"[{between}1]")
        == is_allowed
    )


def test_a_lark_grammar_with_a_schema_in_it() -> None:
    grammar = lark_grammar('start: "result: " %json {"type": "integer"} DOT?\nDOT: "."')
    assert accepts(grammar, "result: 12") and accepts(grammar, "result: 12.")
    assert not accepts(grammar, "result: x")


@pytest.mark.parametrize("text", ["%json x", "%json 5", "%json {"])
def test_a_lark_grammar_may_have_texts_that_name_a_schema(text: str) -> None:
    assert accepts(lark_grammar(f"start: {json.dumps(text)} // {text}"), text)


def test_a_complete_output_allows_all_end_of_sequence_tokens_and_nothing_else() -> None:
    matcher = COMPILER.matcher(regex_grammar("ab?"))
    first = allowed(matcher)
    assert {TOKENIZER.id_to_token(token_id) for token_id in first} == {"a", "ab"}
    matcher.consume_token(TOKENIZER.token_to_id("a"))
    assert allowed(matcher) == {TOKENIZER.token_to_id("b"), *EOS}
    matcher.consume_token(TOKENIZER.token_to_id("b"))
    assert allowed(matcher) == set(EOS)
    matcher.consume_token(EOS[1])
    assert allowed(matcher) == set(EOS)


def test_only_text_tokens_are_allowed() -> None:
    """No special token, and none of the ids by which the model's vocabulary is larger than the tokenizer's."""
    # No text starts with the middle of a character.
    texts = {token_id for token_id in range(1015) if not TOKENIZER.decode([token_id]).startswith("\ufffd")}
    ids = allowed(COMPILER.matcher(regex_grammar(r"(?s:.*)")))
    assert texts <= ids and ids - set(range(1015)) == set(EOS)


BAD = [
    (json_schema_grammar, "[1", "JSON that can't be read"),
    (json_schema_grammar, "true", "not a JSON schema"),
    (json_schema_grammar, '{"minimum": NaN}', "NaN"),
    (json_schema_grammar, '{"type": "nope"}', "Invalid type: nope"),
    (json_schema_grammar, '{"not": {}}', "Unimplemented"),
    (json_schema_grammar, '{"not": {}, "x-guidance": {"lenient": true}}', "Unimplemented"),
    (json_schema_grammar, '{"$ref": "http://example.com/x"}', "does not fetch"),
    (json_schema_grammar, '{"$ref": "#/nope"}', "does not exist"),
    (json_schema_grammar, '{"type": "integer", "minimum": 5, "maximum": 1}', "Unsatisfiable"),
    (json_schema_grammar, '{"type": "string", "pattern": "("}', "unclosed group"),
    (regex_grammar, "(" + 1000 * "a", "unclosed group"),
    (regex_grammar, r"(a)\1", "backreferences are not supported"),
    (regex_grammar, "(?=a)b", "look-around"),
    (lark_grammar, "start: nothing", 'unknown name: "nothing"'),
    (lark_grammar, "", "no start rule"),
    (lark_grammar, '{"grammars": []}', "expecting rule"),
    (lark_grammar, "start: start", "allows no text"),
    (lark_grammar, 'start: %json "a', 'failed to parse "%json"'),
]


@pytest.mark.parametrize(("convert", "text", "reason"), BAD, ids=[text[:24] for _, text, _ in BAD])
def test_a_wrong_grammar_has_a_short_reason(convert, text: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(GrammarError, match=re.escape(reason)) as caught:
        COMPILER.check(convert(text))
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def nested(depth: int) -> str:
    return depth * '{"type": "array", "items": ' + "{}" + depth * "}"


COSTLY = [
    regex_grammar("a{1,100000}"),
    regex_grammar("(((a{1,100}){1,100}){1,100}){1,100}"),
    regex_grammar("(a|b)*a(a|b){5000}"),
    lark_grammar('start: e\ne: e e | "a" e | e "b" | "a" | "b" | ""'),
    lark_grammar('start: "a"{1,50000000}'),
    json_schema_grammar(json.dumps({"enum": [f"value {n}" * 3 for n in range(5000)]})),
    json_schema_grammar('{"type": "array", "minItems": 50000000, "items": {"type": "integer"}}'),
    json_schema_grammar(nested(60)),
    json_schema_grammar(json.dumps({"anyOf": [{"type": "array", "items": {"enum": [n]}} for n in range(3000)]})),
]


@pytest.mark.parametrize("grammar", COSTLY, ids=[grammar[:60] for grammar in COSTLY])
def test_a_costly_grammar_works_or_fails_soon(grammar: str) -> None:
    """Here and after each of its first tokens."""
    rng = np.random.default_rng(0)
    started = time.monotonic()
    try:
        matcher = COMPILER.matcher(grammar)
        for _ in range(100):
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error() or matcher.is_stopped():
                break
            matcher.consume_token(int(rng.choice(np.flatnonzero(np.unpackbits(bits, bitorder="little")))))
    except GrammarError:
        pass
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param("[" * 100_000, id="deep"),
        pytest.param(nested(5000), id="deep schema"),
        '{"multipleOf": 9999991}',
        '{"m\\u0075ltipleOf": 9999991}',
        '{"multipleOf": 9999991, "multipleOf": 1}',
        '{"multipleOf": 1.0000001}',
        '{"multipleOf": 3e-400}',
        '{"multipleOf": 1e99999999999999999999}',
        '{"multipleOf": 1e-99999999999999999999}',
        '{"allOf": [{"multipleOf": 311}, {"multipleOf": 317}]}',
        pytest.param('{"multipleOf": ' + "9" * 10_000 + "}", id="long number"),
        pytest.param(json.dumps({"properties": {f"p{n}": {"type": "null"} for n in range(4000)}}), id="4000 members"),
    ],
)
def test_a_hostile_schema_is_refused_at_once(schema: str) -> None:
    started = time.monotonic()
    for convert, text in ((json_schema_grammar, schema), (lark_grammar, f"start: %json {schema}")):
        with pytest.raises(GrammarError):
            COMPILER.check(convert(text))
    assert time.monotonic() - started < 3


def test_a_schema_can_not_hide_behind_a_text() -> None:
    started = time.monotonic()
    with pytest.raises(GrammarError, match="too costly"):
        COMPILER.check(lark_grammar('start: "%json" %json {"type": "integer", "multipleOf": 9999991} "x"'))
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("multiple", ["5", "0.01", "1000000", "2.5", "12000"])
def test_usual_multiples_are_accepted(multiple: str) -> None:
    COMPILER.check(json_schema_grammar(f'{{"type": "number", "multipleOf": {multiple}}}'))


@pytest.mark.parametrize(("is_long", "num_compiled"), [(True, 2), (False, 2 * MAX_COPIES)])
def test_a_long_grammar_is_compiled_once_for_a_few_matchers(
    is_long: bool, num_compiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many threads ask for them at once. A short one is compiled for each."""
    monkeypatch.setattr(structured_output, "MAX_OWN_CHARACTERS", 0 if is_long else 1000)
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    compiled = []
    compile_one = compiler._compile

    def slow(text: str) -> structured_output.Matcher:
        compiled.append(text)
        time.sleep(0.05)
        return compile_one(text)

    monkeypatch.setattr(compiler, "_compile", slow)
    grammar, matchers = regex_grammar("ab?"), []
    for _ in range(20):
        compiler.check(grammar)
    threads = [
        threading.Thread(target=lambda: matchers.append(compiler.matcher(grammar))) for _ in range(2 * MAX_COPIES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled == [grammar] * num_compiled
    # Each has a place of its own in the grammar.
    matchers[0].consume_token(TOKENIZER.token_to_id("a"))
    assert allowed(matchers[0]) == {TOKENIZER.token_to_id("b"), *EOS}
    assert all(TOKENIZER.token_to_id("a") in allowed(matcher) for matcher in matchers[1:])


def test_a_limit_that_one_output_reaches_is_not_reached_by_all_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a grammar whose outputs each need some hundred states."""
    monkeypatch.setattr(structured_output, "MAX_LEXER_STATES", 3000)
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    grammar, rng = regex_grammar("(.*a.{18}|.*b.{18}|.*c.{18})"), np.random.default_rng(0)
    for _ in range(12):
        matcher = compiler.matcher(grammar)
        for _ in range(150):
            matcher.consume_token(int(rng.choice(sorted(allowed(matcher) - {*EOS}))))


def test_threads_serve_matchers_at_once() -> None:
    threads = MatcherThreads(2)
    matchers = [COMPILER.matcher(regex_grammar(regex)) for regex in ("ab?", "ba", "c+")]
    threads.consume([(matcher, TOKENIZER.token_to_id(token)) for matcher, token in zip(matchers, "abc", strict=True)])
    bits = np.zeros((4, -(-PADDED // 32)), np.uint32)
    threads.fill([(matcher, place) for place, matcher in enumerate(matchers, 1)], bits)
    sets = np.unpackbits(bits.view(np.uint8), axis=1, count=PADDED, bitorder="little")
    assert [set(np.flatnonzero(line).tolist()) for line in sets] == [set(), *map(allowed, matchers)]
    assert allowed(matchers[0]) == {TOKENIZER.token_to_id("b"), *EOS}


def test_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "MAX_CACHED_GRAMMARS", 3)
    monkeypatch.setattr(structured_output, "MAX_CACHED_CHARACTERS", 1000)
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    texts = [regex_grammar(f"a{n}") for n in range(5)]
    for text in [*texts, texts[2]]:
        compiler.check(text)
    assert list(compiler._compiled) == [texts[3], texts[4], texts[2]]
    long = regex_grammar("a" * 2000)
    compiler.check(long)
    assert list(compiler._compiled) == [long]


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "eos", "reason"),
    [
        (TOKENIZER, VOCAB, (), "no end-of-sequence token"),
        (TOKENIZER, 100, EOS, "vocab size too small"),
        (TOKENIZER, VOCAB, (5000,), "out of range"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(
    tokenizer: Tokenizer, vocab_size: int, eos: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(GrammarError, match=reason):
        GrammarCompiler(tokenizer.to_str().encode(), vocab_size, eos)


def test_a_tokenizer_with_byte_tokens() -> None:
    tokenizer = byte_fallback()
    compiler = GrammarCompiler(tokenizer.to_str().encode(), tokenizer.get_vocab_size(), (0,))
    expected = {tokenizer.token_to_id(token) for token in ("é", "<0xC3>", "b", "<0x62>")}
    assert allowed(compiler.matcher(regex_grammar("é|b"))) == expected
