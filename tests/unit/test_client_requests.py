"""What a client refuses before it calls: values that do not fit the wire, by their field."""

from typing import Any

import pytest

from shared.errors import InvalidRequest
from tandem.client import TandemClient

LONE_SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("generate", {"prompt": [-1]}, "prompt"),
        ("generate", {"prompt": [2**32]}, "prompt"),
        ("generate", {"prompt": ["a"]}, "prompt"),
        ("generate", {"prompt": 5}, "prompt"),
        ("generate", {"prompt": LONE_SURROGATE}, "prompt"),
        ("generate", {"prompt": "x", "request_id": 5}, "request_id"),
        ("generate", {"prompt": "x", "priority": 2**40}, "priority"),
        ("generate", {"prompt": "x", "cache_salt": LONE_SURROGATE}, "cache_salt"),
        ("tokenize", {"text": LONE_SURROGATE}, "text"),
        ("detokenize", {"token_ids": [-1]}, "token_ids"),
        ("abort", {"request_id": 5}, "request_id"),
    ],
)
def test_what_does_not_fit_the_wire_is_refused_by_its_field(method: str, arguments: dict[str, Any], field: str) -> None:
    # Nobody listens there.
    with TandemClient("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        getattr(client, method)(**arguments)
    assert [violation.field for violation in caught.value.violations] == [field]
