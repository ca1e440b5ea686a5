"""SamplingParams: a value that no server takes is refused, by its field, when the object is made."""

import json
import math
from typing import Any

import numpy as np
import pytest

from tandem.sampling_params import SamplingParams
from tandem.structured_output import StructuredOutput
from tandem.v1 import inference_pb2
from tandem_shared.errors import InvalidRequest

BAD: list[tuple[str, Any]] = [
    ("n", 0), ("n", -1), ("n", 1.5), ("n", "2"), ("n", True), ("n", 2**32),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e39),
    ("temperature", "1"), ("temperature", True),
    ("top_k", -2), ("top_k", 1.0), ("top_k", 2**32), ("top_k", "5"),
    ("top_p", 0), ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan), ("top_p", -1), ("top_p", 1e-50), ("top_p", [1]),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
    ("seed", -1), ("seed", 2**64), ("seed", 1.0), ("seed", "1"),
    ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2**32), ("max_tokens", math.inf),
    ("stop", ""), ("stop", ("",)), ("stop", ("a", 5)), ("stop", 5), ("stop", b"a"), ("stop", "\ud800"),
    ("stop_token_ids", (-1,)), ("stop_token_ids", (1.0,)), ("stop_token_ids", 5), ("stop_token_ids", "5"),
    ("stop_token_ids", (2**32,)), ("stop_token_ids", (True,)),
    ("ignore_eos", 1), ("ignore_eos", "no"),
    ("logprobs", -1), ("logprobs", True), ("logprobs", 1.5),
    ("skip_special_tokens", 0), ("include_stop_str_in_output", 1),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("presence_penalty", math.nan), ("repetition_penalty", 0),
    ("min_tokens", -1), ("min_tokens", 1.0), ("prompt_logprobs", -1),
    ("logit_bias", {5: 100.5}), ("logit_bias", {5: math.nan}), ("logit_bias", {5: True}), ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"-1": 1.0}), ("logit_bias", {"x": 1.0}), ("logit_bias", {2**32: 1.0}), ("logit_bias", {"٣": 1.0}),
    ("logit_bias", {"9" * 5000: 1.0}), ("logit_bias", [5]), ("logit_bias", {5.0: 1.0}),
    ("bad_words", "a"), ("bad_words", [""]), ("bad_words", ["\ud800"]), ("bad_words", [5]),
    ("allowed_token_ids", []), ("allowed_token_ids", ()), ("allowed_token_ids", [-1]), ("logprob_token_ids", [1.5]),
    ("structured_outputs", {"regex": "a"}), ("structured_outputs", "a"),
    ("top_k", 10**5000), ("temperature", 10**5000), ("stop_token_ids", [10**5000]), ("logit_bias", {10**5000: 1}),
    ("temperature", "x" * 5000), ("stop_token_ids", [*range(5000), "x"]), ("stop", ["x" * 5000, ""]),
    ("stop", "x" * 5000 + "\ud800"), ("ignore_eos", "x" * 5000), ("structured_outputs", "x" * 5000),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD, ids=range(len(BAD)))
def test_a_value_that_no_server_takes_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{field}: must be") as caught:
        SamplingParams(**{field: value})
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(str(caught.value)) < 300


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_k=-2, seed=-1, top_p=0, max_tokens=3)
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


def test_vllms_habits_are_accepted() -> None:
    params = SamplingParams(top_k=-1, seed=None, stop=None, stop_token_ids=None, bad_words=None, logit_bias=None)
    assert params.sampling() == inference_pb2.SamplingParams(top_k=0)
    assert params.stopping() == inference_pb2.StoppingCriteria()
    assert params.output() == inference_pb2.OutputOptions() and params.structured_output() is None


def test_every_field_goes_on_the_wire_under_its_own_name() -> None:
    params = SamplingParams(
        presence_penalty=np.float32(0.5),
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={5: 1, "7": np.float64(-2.5), np.int64(9): 100},
        bad_words=("a", "b"),
        allowed_token_ids=[3, np.int32(4)],
        min_tokens=2,
        include_stop_str_in_output=True,
        logprobs=1,
        prompt_logprobs=0,
        logprob_token_ids=[8],
    )
    assert params.sampling() == inference_pb2.SamplingParams(
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias={5: 1.0, 7: -2.5, 9: 100.0},
        bad_words=["a", "b"],
        allowed_token_ids=[3, 4],
    )
    assert params.stopping() == inference_pb2.StoppingCriteria(min_tokens=2, include_stop_string=True)
    output = inference_pb2.OutputOptions(num_logprobs=1, num_prompt_logprobs=0, logprob_token_ids=[8])
    assert params.output() == output and params.output().HasField("num_prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: must be at most max_tokens, 4, is 5"),
        ({"logit_bias": {5: 1.0, "5": 2.0}}, "logit_bias: has a token twice"),
        ({"logit_bias": {"05": 1.0, 5: 2.0}}, "logit_bias: has a token twice"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert str(caught.value) == told


SCHEMA = {"type": "object", "properties": {"é": {"enum": [1, None]}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}),
        ({"json": "{}"}, {"json_schema": "{}"}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "a+", "json_object": False}, {"regex": "a+"}),
        ({"choice": ("yes", "no")}, {"choice": {"texts": ["yes", "no"]}}),
        ({"grammar": "start: A", "start_after_token_id": np.int64(0)}, {"lark": "start: A", "start_after_token_id": 0}),
    ],
)
def test_a_form_goes_on_the_wire(fields: dict[str, Any], message: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=StructuredOutput(**fields))
    assert params.structured_output() == inference_pb2.StructuredOutput(**message)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "structured_outputs"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs"),
        ({"json_object": False}, "structured_outputs"),
        ({"json": {"a": {1}}}, "json"),
        ({"json": {"a": math.inf}}, "json"),
        ({"json": {("b",): 1}}, "json"),
        ({"json": 5}, "json"),
        ({"json_object": 1}, "json_object"),
        ({"regex": b"a"}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"choice": "yes"}, "choice"),
        ({"choice": []}, "choice"),
        ({"choice": ["yes", ""]}, "choice"),
        ({"grammar": 5}, "grammar"),
        ({"regex": "a", "start_after_token_id": -1}, "start_after_token_id"),
        ({"regex": "a", "start_after_token_id": True}, "start_after_token_id"),
    ],
    ids=str,
)
def test_a_wrong_form_is_refused_by_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StructuredOutput(**fields)
    assert [violation.field for violation in caught.value.violations] == [field]
