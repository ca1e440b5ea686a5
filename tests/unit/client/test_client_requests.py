"""What a client refuses before it calls: values that do not fit the wire, by their field."""

from typing import Any

import pytest

from tandem.client import TandemClient
from tandem_shared.errors import InvalidRequest

LONE_SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": LONE_SURROGATE}, "prompt"),
        ({"prompt": "x", "request_id": 5}, "request_id"),
        ({"prompt": "x", "priority": 2**40}, "priority"),
        ({"prompt": "x", "cache_salt": LONE_SURROGATE}, "cache_salt"),
    ],
)
def test_what_does_not_fit_the_wire_is_refused_by_its_field(arguments: dict[str, Any], field: str) -> None:
    # Nobody listens there.
    with TandemClient("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        client.generate(**arguments)
    assert [violation.field for violation in caught.value.violations] == [field]
