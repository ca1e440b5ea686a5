"""What requests ask of sampling, through a real client and the embedded model. The truth is computed from what the
replies themselves say of the model: log-probabilities are the model's own, so they tell what a penalty must choose.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from tandem import LLM, SamplingParams
from tandem.v1 import inference_pb2
from tests.support.tokenizers import embedded

PROMPT = "ROMEO:\nBut soft, what light through yonder window breaks?\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("embedded", dtype="float64") as llm:
        yield llm


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return embedded()


def choice_of(llm: LLM, params: SamplingParams, prompt: str | list[int] = PROMPT) -> inference_pb2.Choice:
    return llm.client.generate(prompt, params).choices[0]


def test_a_reports_bytes_join_to_the_text_and_ranks_are_places(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=60, ignore_eos=True, skip_special_tokens=False, logprobs=20)
    choice = choice_of(llm, params)
    assert b"".join(report.token_bytes for report in choice.logprobs).decode(errors="replace") == choice.text
    assert "".join(report.text for report in choice.logprobs) == choice.text
    ranks = Counter(report.rank for report in choice.logprobs)
    assert ranks[1] < 60
    for report in choice.logprobs:
        top = {each.token_id: each.logprob for each in report.top}
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert (report.token_id in top) == (report.rank <= 20)
        if report.rank <= 20:
            assert top[report.token_id] == report.logprob == sorted(top.values(), reverse=True)[report.rank - 1]


def test_penalties_choose_what_the_models_own_distribution_says(llm: LLM) -> None:
    presence, frequency = 0.75, 0.5
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        max_tokens=80,
        ignore_eos=True,
        logprobs=20,
    )
    choice = choice_of(llm, params)
    counts: Counter[int] = Counter()
    for report in choice.logprobs:
        scores = {
            each.token_id: each.logprob - frequency * counts[each.token_id] - presence * (counts[each.token_id] > 0)
            for each in report.top
        }
        best = max(scores.values())
        # No token beyond the twenty likeliest can have been better.
        assert best > report.top[-1].logprob
        assert scores[report.token_id] == pytest.approx(best, abs=1e-5)
        counts[report.token_id] += 1
    unpenalised = choice_of(llm, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    assert len(counts) > len(set(unpenalised.token_ids))


def test_a_prompts_log_probabilities_are_those_that_it_had_as_an_output(llm: LLM, tokenizer: Tokenizer) -> None:
    choice = choice_of(llm, SamplingParams(seed=5, max_tokens=60, ignore_eos=True, logprobs=3))
    ids = tokenizer.encode(PROMPT).ids
    reply = llm.client.generate([*ids, *choice.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert [report.token_id for report in reply.prompt_logprobs] == [*ids[1:], *choice.token_ids]
    for told, expected in zip(reply.prompt_logprobs[len(ids) - 1 :], choice.logprobs, strict=True):
        assert (told.rank, told.token_bytes, told.text) == (expected.rank, expected.token_bytes, expected.text)
        assert told.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [each.token_id for each in told.top] == [each.token_id for each in expected.top]


def test_lists_make_tokens_possible_and_impossible(llm: LLM, tokenizer: Tokenizer) -> None:
    greedy = {"temperature": 0, "ignore_eos": True, "max_tokens": 60}
    plain = choice_of(llm, SamplingParams(**greedy))
    [word] = Counter(word for word in plain.text.split() if word.isalpha() and len(word) > 1).most_common(1)
    without = choice_of(llm, SamplingParams(**greedy, bad_words=[word[0]]))
    spellings = [tokenizer.encode(space + word[0]).ids for space in ("", " ")]
    text_ids = list(without.token_ids)
    assert not any(text_ids[i : i + len(ids)] == ids for ids in spellings for i in range(len(text_ids)))
    assert without.text != plain.text
    allowed = tokenizer.encode(" yes no\n").ids
    assert set(choice_of(llm, SamplingParams(**greedy, allowed_token_ids=allowed)).token_ids) <= set(allowed)
    forced = choice_of(llm, SamplingParams(**greedy, logit_bias={str(allowed[0]): 100}, logprob_token_ids=allowed[:1]))
    assert set(forced.token_ids) == {allowed[0]}
    assert all(report.requested[0].logprob == report.logprob for report in forced.logprobs)


def test_an_output_does_not_end_before_min_tokens(llm: LLM) -> None:
    [newline] = embedded().encode("\n").ids
    params = {"temperature": 0, "max_tokens": 80, "stop_token_ids": [newline]}
    early = choice_of(llm, SamplingParams(**params))
    late = choice_of(llm, SamplingParams(**params, min_tokens=len(early.token_ids) + 5))
    assert early.token_ids[-1] == newline
    assert newline not in late.token_ids[: len(early.token_ids) + 5]
