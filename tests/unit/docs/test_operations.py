"""docs/operations.md and docs/settings.md against the code."""

import re

import pytest

from tandem_gateway.errors import error_response
from tandem_shared.errors import FieldViolation, InvalidRequest, TandemError, reason_of
from tandem_shared.rpc.rich_status import PUBLIC_STATUS_CODES
from tests.support.requirements import ROOT
from tools.settings_reference import REFERENCE, text

ROWS = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE))


def test_every_error_has_its_row() -> None:
    assert set(ROWS) == {reason_of(error_class) for error_class in PUBLIC_STATUS_CODES}


@pytest.mark.parametrize("error_class", PUBLIC_STATUS_CODES, ids=reason_of)
def test_an_error_has_the_status_that_is_stated(error_class: type[TandemError]) -> None:
    statuses = ROWS[reason_of(error_class)].split(" | ")[0]
    is_request = error_class is InvalidRequest
    error = InvalidRequest(FieldViolation("sampling.top_p", "is wrong")) if is_request else error_class("why")
    http_status = error_response(error).status_code
    assert re.match(rf"{PUBLIC_STATUS_CODES[error_class].name}, {http_status}\b", statuses)


def test_the_settings_are_current() -> None:
    assert REFERENCE.read_text() == text(), "run make docs"
