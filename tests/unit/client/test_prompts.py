"""The forms in which LLM takes prompts and params."""

import random
from typing import Any

import numpy as np
import pytest

from tandem.prompts import Item, is_single, read_items
from tandem.sampling_params import SamplingParams
from tandem_shared.errors import InvalidRequest

PARAMS = SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3],
        (1, 2, 3),
        [np.int64(1), 2, np.int32(3)],
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.uint32),
        {"prompt_token_ids": [1, 2, 3]},
        {"prompt_token_ids": np.array([1, 2, 3]), "prompt": None},
    ],
    ids=str,
)
def test_token_ids_have_many_forms(prompt: Any) -> None:
    assert is_single(prompt)
    [item] = read_items([prompt], PARAMS)
    assert item == Item([1, 2, 3], PARAMS)
    assert all(type(each) is int for each in item.prompt)


def test_texts_and_dicts_of_texts() -> None:
    assert is_single("a b") and is_single({"prompt": "a b"})
    assert read_items(["a b", {"prompt": "c", "cache_salt": "s"}], PARAMS) == [
        Item("a b", PARAMS),
        Item("c", PARAMS, "s"),
    ]


@pytest.mark.parametrize(
    "prompts",
    [[], ["a"], [[1]], [np.array([1])], np.array([[1, 2], [3, 4]]), [{"prompt": "a"}], iter(["a"])],
    ids=["empty", "text", "ids", "array of ids", "array of prompts", "dict", "iterator"],
)
def test_lists_are_not_taken_for_one_prompt(prompts: Any) -> None:
    assert not is_single(prompts)


def test_the_rows_of_an_array_are_prompts() -> None:
    assert [item.prompt for item in read_items(np.array([[1, 2], [3, 4]]), None)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (None, "must be a text"),
        (5, "must be a text"),
        (b"abc", "must be a text"),
        ([1, "2"], "must be a text"),
        ([1.0], "must be a text"),
        ([True], "must be a text"),
        (np.array([1.5]), "must be a text"),
        (np.array([[1]]), "must be a text"),
        ({}, "exactly one"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "multi_modal_data": 5}, "has unknown keys: multi_modal_data; known are prompt,"),
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_by_its_index(prompt: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        read_items(["a", prompt, "b"], None)
    assert [violation.field for violation in caught.value.violations] == ["prompts[1]"]


def test_params_are_for_all_or_for_each() -> None:
    params = [SamplingParams(max_tokens=number) for number in (1, 2)]
    assert [item.params for item in read_items(["a", "b"], params)] == params
    assert [item.params for item in read_items(["a", "b"], None)] == [SamplingParams()] * 2
    with pytest.raises(InvalidRequest, match="sampling_params: are 2 for 3 prompts"):
        read_items(["a", "b", "c"], params)
    with pytest.raises(InvalidRequest, match=r"sampling_params\[1\]: must be SamplingParams, is dict"):
        read_items(["a", "b"], [PARAMS, {"max_tokens": 1}])  # type: ignore[list-item]


def test_each_prompt_has_its_priority() -> None:
    assert [item.priority for item in read_items("ab", None)] == [None, None]
    assert [item.priority for item in read_items("ab", None, priority=[3, -1])] == [3, -1]
    with pytest.raises(InvalidRequest, match="priority: has 1 for 2 prompts"):
        read_items("ab", None, priority=[3])


def test_seeds_go_to_params_that_have_none() -> None:
    params = [SamplingParams(), SamplingParams(seed=0), SamplingParams(max_tokens=5)]
    once, again = ([item.params for item in read_items("abc", params, random.Random(7))] for _ in range(2))
    assert once == again
    assert once[1].seed == 0 and once[2].max_tokens == 5
    assert len({once[0].seed, once[2].seed, None}) == 3
