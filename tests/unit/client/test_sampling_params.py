"""SamplingParams: a value that no server takes is refused, by its field, when the object is made."""

import math
from typing import Any

import numpy as np
import pytest

from tandem.sampling_params import SamplingParams
from tandem_shared.errors import InvalidRequest

BAD: list[tuple[str, Any]] = [
    ("n", 0), ("n", -1), ("n", 1.5), ("n", "2"), ("n", True), ("n", 2**32),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e39),
    ("temperature", "1"), ("temperature", True),
    ("top_k", -1), ("top_k", 1.0), ("top_k", 2**32), ("top_k", "5"),
    ("top_p", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("top_p", -1), ("top_p", 1e-50), ("top_p", [1]),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("seed", -1), ("seed", 2**64), ("seed", 1.0), ("seed", "1"),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2**32), ("max_tokens", math.inf),
    ("stop", ""), ("stop", ("",)), ("stop", ("a", 5)), ("stop", 5), ("stop", None), ("stop", b"a"), ("stop", "\ud800"),
    ("stop_token_ids", (-1,)), ("stop_token_ids", (1.0,)), ("stop_token_ids", 5), ("stop_token_ids", "5"),
    ("stop_token_ids", (2**32,)), ("stop_token_ids", None), ("stop_token_ids", (True,)),
    ("ignore_eos", 1), ("ignore_eos", "no"),
    ("logprobs", -1), ("logprobs", True), ("logprobs", 1.5),
    ("skip_special_tokens", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_that_no_server_takes_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: must be") as caught:
        SamplingParams(**{field: value})
    assert [violation.field for violation in caught.value.violations] == [field]


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_k=-1, seed=-1, top_p=0, max_tokens=3)
    assert [violation.field for violation in caught.value.violations] == ["top_k", "top_p", "seed"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "max_tokens": 1, "logprobs": 0},
        {"temperature": 0.6, "top_p": 1e-30, "min_p": 1.0, "seed": 2**64 - 1, "top_k": 2**32 - 1},
        {"n": np.int64(2), "temperature": np.float32(0.5), "seed": np.uint64(7), "stop_token_ids": (np.int32(5),)},
        {"stop": "\n"}, {"stop": ("a", "é\U0001f600")}, {"stop": ["a"], "stop_token_ids": [1, 2]},
    ],
)  # fmt: skip
def test_what_is_allowed_goes_on_the_wire(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    sampling, stopping, _ = params.sampling(), params.stopping(), params.output()
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        assert sampling.HasField(name) == (name in fields)
        assert getattr(sampling, name) == pytest.approx(fields.get(name, 0), rel=1e-6, abs=0)
    assert list(stopping.stop_token_ids) == list(fields.get("stop_token_ids", []))
    assert "".join(stopping.stop_strings) == "".join(fields.get("stop", ""))
