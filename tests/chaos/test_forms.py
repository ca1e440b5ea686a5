"""The short form of each part, and in the slow tests the long one: every promise is met."""

import pytest

from tests.chaos.harness.definitions import Form, Part
from tests.chaos.harness.parts import PARTS
from tests.chaos.harness.results import FOLDER
from tests.chaos.harness.table import BEGIN, DOCUMENT, END, table


def try_out(part: Part, form: Form) -> None:
    if reason := part.why_not():
        pytest.skip(reason)
    pieces = [part.run(**asked) for asked in part.pieces[form]]
    rows = part.rows(pieces)
    assert rows
    assert not [row for row in rows if not row.is_met]


@pytest.mark.parametrize("part", [part for part in PARTS if part.pieces[Form.SHORT]], ids=lambda part: part.name)
def test_short_form(part: Part) -> None:
    try_out(part, Form.SHORT)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [part for part in PARTS if part.pieces[Form.LONG]], ids=lambda part: part.name)
def test_long_form(part: Part) -> None:
    try_out(part, Form.LONG)


def test_the_table_in_the_docs_is_that_of_the_results() -> None:
    _, _, rest = DOCUMENT.read_text().partition(BEGIN + "\n")
    assert rest.partition(END)[0] == table(PARTS, FOLDER)
