"""The checks on plain parameters: lengths come before elements, and a checked request has what the engine needs."""

import math
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from tandem_scheduler.engine_interface import Submission
from tandem_scheduler.front_end.generation_params import GenerationParams
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tandem_scheduler.front_end.validation import GenerationRequest, check_model, check_request, check_submission
from tandem_scheduler.front_end.violations import MAX_VIOLATIONS
from tandem_shared.errors import InvalidRequest
from tandem_shared.sampling_fields import RowSampling
from tests.support.builders import create_request, worker_info
from tests.support.tokenizers import WatchedTokenizer, embedded
from tests.support.unreadable import Unreadable, UnreadableMapping

WORKER = worker_info(vocab_size=1024, max_model_len=512)
ENCODER = TextEncoder(embedded())
GOOD = GenerationParams(prompt_token_ids=[1, 2, 3], max_tokens=8)


async def check(params: GenerationParams) -> GenerationRequest:
    return await check_request(params, ENCODER, WORKER, "served")


async def violations_of(**changes: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        await check(replace(GOOD, **changes))
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt.token_ids", {"prompt_token_ids": Unreadable(513)}),
        ("stopping.stop_strings", {"stop_strings": Unreadable(65)}),
        ("stopping.stop_token_ids", {"stop_token_ids": Unreadable(129)}),
        ("sampling.bad_words", {"bad_words": Unreadable(129)}),
        ("sampling.allowed_token_ids", {"allowed_token_ids": Unreadable(16385)}),
        ("output.logprob_token_ids", {"logprob_token_ids": Unreadable(21)}),
        ("sampling.logit_bias", {"logit_bias": UnreadableMapping(1025)}),
    ],
)
async def test_of_too_many_elements_none_is_read(field: str, changes: dict[str, Any]) -> None:
    assert list(await violations_of(**changes)) == [field]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("request_id", {"request_id": "x" * 257}),
        ("request_id", {"request_id": "é" * 129}),
        ("request_id", {"request_id": "a\nb"}),
        ("request_id", {"request_id": "\ud800"}),
        ("cache_salt", {"cache_salt": "x" * 1025}),
        ("model", {"model": "x" * 10_000_000}),
        ("stopping.stop_strings", {"stop_strings": ["x" * 1024] * 8 + ["x"]}),
        ("priority", {"priority": 2**31}),
        ("sampling.seed", {"sampling": {"seed": 2**64}}),
        ("sampling.seed", {"sampling": {"seed": -1}}),
        ("sampling.top_k", {"sampling": {"top_k": -1}}),
        ("output.num_logprobs", {"num_logprobs": -1}),
        ("prompt.token_ids", {"prompt_token_ids": [1, -1]}),
        ("stopping.stop_token_ids[1]", {"stop_token_ids": [1, -1]}),
        ("sampling.presence_penalty", {"sampling": {"presence_penalty": 2.5}}),
        ("sampling.frequency_penalty", {"sampling": {"frequency_penalty": -2.5}}),
        ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": 0}}),
        ("sampling.logit_bias[7]", {"logit_bias": {6: 1.0, 7: 100.5}}),
        ("sampling.logit_bias[7]", {"logit_bias": {7: math.nan}}),
        ("sampling.logit_bias[1024]", {"logit_bias": {1024: 1.0}}),
        ("sampling.bad_words[1]", {"bad_words": ["fine", ""]}),
        ("sampling.bad_words[1]", {"bad_words": ["fine", "x" * 257]}),
        ("sampling.bad_words[1]", {"bad_words": ["fine", "\U0001f600" * 9]}),
        ("sampling.bad_words[0]", {"bad_words": ["\ud800"]}),
        ("sampling.allowed_token_ids", {"allowed_token_ids": [5, 1024]}),
        ("stopping.min_tokens", {"min_tokens": 9}),
        ("stopping.min_tokens", {"min_tokens": 510, "max_tokens": None}),
        ("output.num_prompt_logprobs", {"num_prompt_logprobs": 21}),
        ("output.logprob_token_ids[1]", {"logprob_token_ids": [5, 1024]}),
        ("output.logprob_token_ids", {"logprob_token_ids": [5, 6, 5]}),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_bad_field_is_named(field: str, changes: dict[str, Any]) -> None:
    found = await violations_of(**changes)
    assert list(found) == [field]
    assert len(found[field]) < 200


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "é" * 128},
        {"cache_salt": "x" * 1024},
        {"stop_strings": ["x" * 1024] * 8, "stop_token_ids": [1] * 128},
        {"priority": -(2**31), "num_logprobs": 20, "num_choices": 64},
        {"sampling": {"seed": 2**64 - 1, "top_k": 2**32 - 1, "top_p": 1, "min_p": 1}},
        {"prompt_token_ids": [1] * 511, "max_tokens": 1},
        {"min_tokens": 8, "num_prompt_logprobs": 20, "logprob_token_ids": range(20)},
        {"sampling": {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1e30}},
        {"logit_bias": {token_id: (-100.0, 100.0)[token_id % 2] for token_id in range(1024)}},
        {"bad_words": ["x" * 16] * 128, "allowed_token_ids": [7] * 16384},
    ],
    ids=lambda changes: ",".join(changes),
)
async def test_the_limits_themselves_are_fine(changes: dict[str, Any]) -> None:
    await check(replace(GOOD, **changes))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "other"}),
        ("request_id", {"request_id": "a\nb"}),
        ("stopping.stop_strings[0]", {"stop_strings": [""]}),
        ("stopping.max_tokens", {"max_tokens": 0}),
        ("stopping.max_tokens", {"max_tokens": 513}),
        ("stopping.max_tokens", {"max_tokens": 100, "max_reply_bytes": 10}),
    ],
    ids=str,
)
async def test_the_long_prompt_of_a_request_that_is_wrong_already_is_not_tokenized(
    field: str, changes: dict[str, Any]
) -> None:
    watched = WatchedTokenizer(embedded())
    long = replace(GOOD, prompt_token_ids=None, prompt_text="Good morrow, cousin. " * 50)
    with pytest.raises(InvalidRequest) as caught:
        await check_request(replace(long, **changes), TextEncoder(watched), WORKER, "served")
    assert [violation.field for violation in caught.value.violations] == [field]
    assert watched.texts == []


async def test_a_short_prompts_faults_are_told_with_all_others() -> None:
    found = await violations_of(prompt_token_ids=None, prompt_text="", model="other", request_id="a\nb")
    assert list(found) == ["model", "request_id", "prompt.text"]


async def test_ten_violations_are_told_and_the_others_counted() -> None:
    found = await violations_of(stop_token_ids=[5000] * 100, stop_strings=[""] * 50)
    assert len(found) == MAX_VIOLATIONS + 1
    assert found[""] == f"and {150 - MAX_VIOLATIONS} more"


def test_a_long_name_is_not_quoted_whole() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_model("\u4e16" * 10_000_000, "served")
    assert sys.getsizeof(str(caught.value)) < 1000


async def test_a_salt_leaves_as_a_short_hash_that_tells_salts_apart() -> None:
    salts = ["", "a", "b", "a" * 1024]
    hashed = [(await check(replace(GOOD, cache_salt=salt))).first.cache_salt for salt in salts]
    assert hashed[0] == "" and all(len(salt) == 32 for salt in hashed[1:])
    assert len(set(hashed)) == 4
    assert (await check(replace(GOOD, cache_salt="a"))).first.cache_salt == hashed[1]


async def test_what_is_asked_of_sampling_beside_numbers_reaches_the_engine() -> None:
    tokenizer = embedded()
    worker = replace(WORKER, eos_token_ids=(1017, 1015))
    asked = replace(
        GOOD,
        logit_bias={7: -1.5, 9: 2.0},
        bad_words=["the", " foo", "  "],
        allowed_token_ids=[9, 5, 9],
        min_tokens=3,
        stop_token_ids=[40, 30],
        ignore_eos=True,
        logprob_token_ids=[8, 2],
        include_stop_string=True,
    )
    checked = await check_request(asked, ENCODER, worker, "served")
    first, lists = checked.first, checked.first.lists
    assert (first.sampling.min_tokens, first.sampling.num_logprobs) == (3, 0)
    assert checked.include_stop_string and first.stop_token_ids == {30, 40}
    assert lists.stop_token_ids == (30, 40, 1015, 1017)
    assert lists.logit_bias == ((7, -1.5), (9, 2.0))
    assert lists.allowed_token_ids == (5, 9)
    assert lists.logprob_token_ids == (8, 2)
    spellings = ["the", " the", "foo", " foo", "  ", "   "]
    assert set(lists.bad_words) == {tuple(tokenizer.encode(text).ids) for text in spellings}


async def test_a_request_that_asks_for_nothing_has_no_lists() -> None:
    first = (await check(replace(GOOD, stop_token_ids=[5]))).first
    assert not first.lists and first.sampling.num_logprobs is None


async def test_many_bad_words_are_tokenized_off_the_loop() -> None:
    """So many words of 30 characters take some milliseconds; the longest that are allowed take ten times as long."""
    threads = set()
    watched = WatchedTokenizer(embedded(), lambda text: threads.add(threading.current_thread()))
    words = ["word " * 6] * 128
    await check_request(replace(GOOD, bad_words=words), TextEncoder(watched), WORKER, "served")
    assert threads and threading.main_thread() not in threads


async def test_a_reply_that_cannot_fit_is_refused_where_the_request_says_so() -> None:
    """32 choices of 400 tokens with 20 log-probabilities are 2.7 MB."""
    large = {"num_choices": 32, "max_tokens": 400, "num_logprobs": 20, "max_reply_bytes": 2**21}
    found = await violations_of(**large)
    assert list(found) == ["stopping.max_tokens"] and "GenerateStream" in found["stopping.max_tokens"]
    for changes in (
        {"max_tokens": None},
        {"num_logprobs": None},
        {"max_reply_bytes": None},
        {"max_reply_bytes": 2**23},
    ):
        await check(replace(GOOD, **large | changes))


GOOD_SUBMISSION = Submission("r", 0, create_request(prompt=[1, 1023], max_tokens=8), 64, "fake-model")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("num_choices", {"num_choices": 0}),
        ("num_choices", {"num_choices": 65}),
        ("first_handle", {"first_handle": 2**64 - 1}),
        ("sampling.temperature", {"first": create_request(sampling=RowSampling(temperature=float("-inf")))}),
        ("sampling.top_p", {"first": create_request(sampling=RowSampling(top_p=float("nan")))}),
        ("output.num_logprobs", {"first": create_request(sampling=RowSampling(num_logprobs=21))}),
        ("prompt.token_ids", {"first": create_request(prompt=[1024])}),
        ("prompt.token_ids", {"first": create_request(prompt=[-1])}),
        ("deadline", {"first": create_request(deadline=float("nan"))}),
    ],
)
def test_a_submission_that_would_harm_others_is_refused(field: str, changes: dict[str, Any]) -> None:
    check_submission(GOOD_SUBMISSION, WORKER)
    with pytest.raises(InvalidRequest) as caught:
        check_submission(replace(GOOD_SUBMISSION, **changes), WORKER)
    assert [violation.field for violation in caught.value.violations] == [field]
