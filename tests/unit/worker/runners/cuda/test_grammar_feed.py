"""Grammars between the steps of a GPU: masks wait for the step before, and for nothing else."""

from collections.abc import Sequence

import numpy as np
import torch

from tandem_shared.step_plan import FAULT_GRAMMAR, Int32Array, NewRow
from tandem_shared.structured_output import GrammarCompiler, regex_grammar
from tandem_worker.runners.cuda.grammar_feed import GrammarFeed
from tandem_worker.runners.grammar_rows import GrammarRows
from tests.support.tokenizers import EMBEDDED, embedded
from tests.unit.worker.runners.test_grammar_rows import EOS, VOCAB, A, B, C, new_row

ALL = frozenset(range(VOCAB))


class Event:
    """A step's end, which is counted when it is waited for."""

    def __init__(self, waits: list[str], name: str) -> None:
        self._waits, self._name = waits, name

    def synchronize(self) -> None:
        self._waits.append(self._name)


class Device:
    """The masks that the device has, by row."""

    def __init__(self) -> None:
        self.allowed: dict[int, frozenset[int]] = {}
        self.num_writes = 0
        self.waits: list[str] = []
        rows = GrammarRows(GrammarCompiler(EMBEDDED.read_bytes(), VOCAB, EOS), VOCAB, EOS)
        self.feed = GrammarFeed(rows, self._set, 8, VOCAB)

    def _set(self, rows: Int32Array, bits: Int32Array) -> None:
        self.num_writes += 1
        sets = np.unpackbits(bits.view(np.uint8), axis=1, count=VOCAB, bitorder="little")
        for row, line in zip(rows.tolist(), sets, strict=True):
            self.allowed[row] = frozenset(np.flatnonzero(line).tolist())

    def step(self, name: str, added: Sequence[NewRow], rows: list[int], token_ids: list[int]) -> dict[int, int]:
        """A step that samples these tokens. Gives the fault codes."""
        self.feed.add(added)
        for new in added:
            self.allowed[new.row] = frozenset()
        numbers = np.array(rows, np.int32)
        codes = self.feed.before_sampling(numbers)
        self.feed.after_sampling(numbers, torch.tensor(token_ids), Event(self.waits, name))  # type: ignore[arg-type]
        return dict(codes)


def test_masks_follow_the_tokens_of_the_step_before() -> None:
    device = Device()
    device.step("1", [new_row(0, regex_grammar("ab?")), new_row(1, None)], [0, 1], [A, 5])
    assert device.waits == [] and device.allowed[0] >= {A} and B not in device.allowed[0]
    device.step("2", [], [0, 1], [B, 5])
    assert device.waits == ["1"] and device.allowed[0] == {B, *EOS}
    device.step("3", [], [0, 1], [EOS[0], 5])
    assert device.waits == ["1", "2"] and device.allowed[0] == {*EOS}


def test_steps_without_grammars_wait_for_nothing() -> None:
    device = Device()
    for number in range(3):
        device.step(str(number), [new_row(1, None)] if not number else [], [1], [5])
    assert device.waits == [] and device.num_writes == 0


def test_the_tokens_of_a_row_that_has_left_reach_nobody() -> None:
    device = Device()
    device.step("1", [new_row(0, regex_grammar("ab?")), new_row(2, regex_grammar("(a|b)c"))], [0, 2], [A, A])
    device.step("2", [new_row(0, regex_grammar("(b|c)a"))], [0, 2], [C, C])
    assert A not in device.allowed[0] and device.allowed[0] >= {B, C}
    device.step("3", [], [0, 2], [A, EOS[0]])
    assert A in device.allowed[0] and device.allowed[2] == {*EOS}
    # All rows with a grammar leave, and others come.
    device.step("4", [new_row(0, None), new_row(2, None)], [0, 2], [A, A])
    device.step("5", [new_row(2, regex_grammar("ab?"))], [0, 2], [A, A])
    assert device.waits == ["1", "2"]
    device.step("6", [], [0, 2], [A, A])
    assert device.allowed[2] == {B, *EOS}


def test_a_row_is_open_until_its_grammar_starts() -> None:
    device, end = Device(), embedded().token_to_id("</think>")
    device.step("1", [new_row(0, regex_grammar("ab?"), start_after_token_id=end)], [0], [C])
    assert device.allowed[0] == ALL
    device.step("2", [], [0], [end])
    assert device.num_writes == 1
    device.step("3", [], [0], [A])
    assert device.allowed[0] >= {A} and B not in device.allowed[0]
    # Another row in its place is closed at first, and opened anew.
    device.step("4", [new_row(0, regex_grammar("ab?"), start_after_token_id=end)], [0], [C])
    assert device.allowed[0] == ALL


def test_a_grammar_that_fails_allows_nothing() -> None:
    device = Device()
    device.step("1", [new_row(0, regex_grammar("ab?")), new_row(1, regex_grammar("a+"))], [0, 1], [C, A])
    assert device.step("2", [], [0, 1], [-3, A]) == {0: FAULT_GRAMMAR}
    assert device.allowed[0] == set() and device.allowed[1] >= {A}
    assert device.step("3", [], [0, 1], [-3, A]) == {0: FAULT_GRAMMAR}


def test_a_new_session_knows_nothing_of_the_one_before() -> None:
    device = Device()
    device.step("1", [new_row(0, regex_grammar("ab?"))], [0], [A])
    device.feed.reset()
    device.step("1", [new_row(0, regex_grammar("ab?"))], [0], [A])
    assert device.waits == [] and B not in device.allowed[0]
