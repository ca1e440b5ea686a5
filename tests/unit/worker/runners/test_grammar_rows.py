"""The grammars of the batch's rows: their state follows from the rows' tokens, and what fails stays shut."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tandem_shared import structured_output
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.step_plan import FAULT_GRAMMAR, NewRow
from tandem_shared.structured_output import GrammarCompiler, json_schema_grammar, lark_grammar, regex_grammar
from tandem_worker.runners.grammar_rows import GrammarRows
from tests.support.tokenizers import EMBEDDED, embedded

VOCAB, EOS = 1024, (1017, 1015)
TOKENIZER = embedded()
A, B, C = (TOKENIZER.token_to_id(token) for token in "abc")
PROMPT = [A, A, A]
PERSON = json_schema_grammar(
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 9}},
            "required": ["name"],
            "additionalProperties": False,
        }
    )
)


def make_rows(compiler: GrammarCompiler | None = None, num_threads: int = 2) -> GrammarRows:
    compiler = compiler or GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    return GrammarRows(compiler, VOCAB, EOS, num_threads)


def new_row(row: int, text: str | None, output: list[int] | None = None, min_tokens: int = 0, **options: Any) -> NewRow:
    """options: of Grammar and SamplingLists."""
    names = ("start_after_token_id", "ignore_eos")
    grammar = None if text is None else Grammar(text, **{name: options.pop(name) for name in names if name in options})
    ids = np.array([*PROMPT, *(output or [])], np.int32)
    lists = SamplingLists(grammar=grammar, **options)
    return NewRow(
        row, 100 + row, ids, len(PROMPT), 0, 0, np.ones(1, np.int32), RowSampling(min_tokens=min_tokens), lists
    )


def masks(rows: GrammarRows, *numbers: int) -> dict[int, set[int]]:
    """The allowed tokens of those rows that have a mask; None in place of those of a row that failed."""
    found = rows.masks(np.array(numbers, np.int32))
    bits = np.unpackbits(found.bits.view(np.uint8), axis=1, count=VOCAB, bitorder="little")
    sets = {row: set(np.flatnonzero(line).tolist()) for row, line in zip(found.rows.tolist(), bits, strict=True)}
    for row, code in found.fault_codes.items():
        assert code == FAULT_GRAMMAR and sets[row] == set()
    return sets


def failed(rows: GrammarRows, *numbers: int) -> list[int]:
    return list(rows.masks(np.array(numbers, np.int32)).fault_codes)


def walk(rows: GrammarRows, row: int, seed: int) -> Iterator[tuple[list[int], set[int]]]:
    """A random output, and before each of its tokens what is allowed, up to the end of the output."""
    rng, output = np.random.default_rng(seed), list[int]()
    while not output or output[-1] not in EOS:
        allowed = masks(rows, row)[row]
        yield list(output), allowed
        output.append(int(rng.choice(sorted(allowed))))
        rows.accept([row], [output[-1]])


@pytest.mark.parametrize(
    "options", [{}, {"min_tokens": 12, "stop_token_ids": EOS}, {"allowed_token_ids": (*range(900), *EOS)}]
)
def test_a_row_that_comes_back_goes_on_as_before(options: dict[str, Any]) -> None:
    """Wherever it was preempted, alone or among others."""
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    rows, others = make_rows(compiler), make_rows(compiler)
    rows.add([new_row(0, PERSON, **options)])
    steps = list(walk(rows, 0, seed=1))
    assert len(steps) > 10
    others.add([new_row(number, PERSON, output, **options) for number, (output, _) in enumerate(steps)])
    assert list(masks(others, *range(len(steps))).values()) == [allowed for _, allowed in steps]


def test_a_late_token_does_not_reach_the_rows_new_owner() -> None:
    rows = make_rows()
    rows.add([new_row(3, regex_grammar("(a|b)c")), new_row(4, regex_grammar("b|ab?")), new_row(5, None)])
    assert masks(rows, 3, 4, 5)[3] >= {A, B}
    # The next plan gives row 3 to another sequence, before the tokens are there.
    rows.add([new_row(3, regex_grammar("(b|c)a"))])
    rows.accept([3, 4, 5], [A, A, 7])
    found = masks(rows, 3, 4, 5)
    assert {B, C} <= found[3] and A not in found[3]
    assert found[4] == {B, *EOS} and 5 not in found


def test_a_grammar_starts_after_its_token() -> None:
    rows = make_rows()
    for output in ([], [B, C]):
        rows.add([new_row(0, regex_grammar("ab?"), output, start_after_token_id=1023)])
        assert 0 not in masks(rows, 0)
        rows.accept([0], [A])
        assert 0 not in masks(rows, 0)
        rows.accept([0], [1023])
        assert A in masks(rows, 0)[0] and B not in masks(rows, 0)[0]
        rows.accept([0], [A])
        assert masks(rows, 0)[0] == {B, *EOS}
    # The prompt does not start it, and later ones are part of what the grammar reads.
    rows.add([new_row(1, regex_grammar("ab?"), [B, 1023, A], start_after_token_id=1023)])
    rows.add([new_row(2, regex_grammar("ab?"), [B], start_after_token_id=A)])
    assert masks(rows, 1, 2) == {1: {B, *EOS}}


def test_end_of_sequence_tokens_are_hidden_where_something_else_is_possible() -> None:
    rows = make_rows()
    rows.add(
        [
            new_row(0, regex_grammar("ab?"), [A]),
            new_row(1, regex_grammar("ab?"), [A], ignore_eos=True),
            new_row(2, regex_grammar("ab?"), [A], min_tokens=2, stop_token_ids=(EOS[0], 7)),
            new_row(3, regex_grammar("ab?"), [A, B], min_tokens=9, stop_token_ids=EOS, ignore_eos=True),
            new_row(4, regex_grammar("ab?"), start_after_token_id=1023, ignore_eos=True),
            new_row(5, regex_grammar("ab?"), start_after_token_id=1023, min_tokens=1, stop_token_ids=(7,)),
            new_row(6, regex_grammar("ab?"), [A], allowed_token_ids=(A, EOS[1]), ignore_eos=True),
            new_row(7, regex_grammar("ab?"), [A], allowed_token_ids=(A,)),
        ]
    )
    everything = set(range(VOCAB))
    found = masks(rows, *range(8))
    assert [found[row] for row in range(4)] == [{B, *EOS}, {B}, {B, EOS[1]}, set(EOS)]
    assert found[4] == everything - set(EOS) and found[5] == everything - {7}
    # What leaves nothing is no fault of the grammar.
    assert found[6] == {EOS[1]} and found[7] == set() and failed(rows, *range(8)) == []
    rows.accept([2, 5], [B, 9])
    assert masks(rows, 2, 5) == {2: set(EOS)}


def test_what_fails_stays_shut_and_the_others_go_on() -> None:
    rows = make_rows()
    rows.add([new_row(0, "start: nothing"), new_row(1, regex_grammar("ab?")), new_row(2, regex_grammar("ab?"), [C])])
    assert failed(rows, 0, 1, 2) == [0, 2]
    assert masks(rows, 0, 1, 2)[1] >= {A}
    # A token that the mask does not allow.
    rows.accept([0, 1, 2], [-1, C, -1])
    assert failed(rows, 0, 1, 2) == [0, 1, 2]
    rows.accept([0, 1, 2], [-1, -1, -1])
    assert failed(rows, 0, 1, 2) == [0, 1, 2]
    rows.add([new_row(1, regex_grammar("ab?"))])
    assert failed(rows, 0, 1, 2) == [0, 2]


def test_a_grammar_that_needs_too_much_later_fails_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "MAX_ITEMS_IN_ROW", 40)
    compiler = GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS)
    ambiguous = lark_grammar('start: e\ne: e e | "a"')
    compiler.check(ambiguous)
    rows = make_rows(compiler)
    rows.add([new_row(0, ambiguous), new_row(1, regex_grammar("a+"))])
    assert failed(rows, 0, 1) == []
    for _ in range(30):
        rows.accept([0, 1], [A, A])
        if 0 in failed(rows, 0, 1):
            break
    assert failed(rows, 0, 1) == [0] and masks(rows, 0, 1)[1] >= {A, *EOS}


def test_a_worker_that_has_no_tokenizer_opens_nothing() -> None:
    rows = GrammarRows(None, VOCAB, EOS)
    rows.add([new_row(0, regex_grammar("a"))])
    assert failed(rows, 0) == [0]


def test_rows_without_grammars_cost_no_thread() -> None:
    rows = make_rows()
    rows.add([new_row(0, None)])
    assert masks(rows, 0) == {}
    rows.accept([0], [5])
    assert rows._compiling is None and rows._matchers is None
