"""Log-probabilities of output and prompt over real gRPC, against those that the fake worker reports."""

import pytest

from tandem_shared.sampling_fields import RowSampling
from tests.contract.services import VOCAB_SIZE, Services, stream_request, true_tokens
from tests.support.builders import create_request
from tests.support.fake_worker import expected_prompt_logprobs, rank_of
from tests.support.tokenizers import embedded


async def test_logprobs_are_as_long_as_the_tokens() -> None:
    request = stream_request(num_logprobs=3)
    async with Services() as services:
        streamed, unary = await services.stream(request), await services.generate(request)
        chosen_only = await services.stream(stream_request(num_logprobs=0))
        none = await services.stream(stream_request())
    logprobs = streamed.choices[0].logprobs
    assert logprobs == list(unary.choices[0].logprobs)
    assert [logprob.token_id for logprob in logprobs] == true_tokens(request)
    assert all([top.logprob for top in logprob.top] == [-0.5, -1.5, -2.5] for logprob in logprobs)
    assert [(p.logprob, len(p.top)) for p in chosen_only.choices[0].logprobs] == [(-0.5, 0)] * 8
    assert none.choices[0].logprobs == []


async def test_a_report_has_the_rank_the_texts_and_the_requested_tokens() -> None:
    tokenizer = embedded()
    request = stream_request(max_tokens=30, num_logprobs=2, logprob_token_ids=[9, 4])
    async with Services() as services:
        streamed, unary = await services.stream(request), await services.generate(request)
        requested_only = await services.stream(stream_request(logprob_token_ids=[3]))
    reports = streamed.choices[0].logprobs
    assert reports == list(unary.choices[0].logprobs)
    assert [report.rank for report in reports] == [rank_of(token_id) for token_id in streamed.token_ids]
    joined = b"".join(report.token_bytes for report in reports)
    assert joined.decode(errors="replace") == tokenizer.decode(streamed.token_ids, skip_special_tokens=False)
    for report in reports:
        assert [(each.token_id, each.logprob) for each in report.requested] == [(9, -4.5), (4, -2.0)]
        for each in (report, *report.top, *report.requested):
            assert each.text == each.token_bytes.decode(errors="replace") != ""
            assert "\ufffd" in each.text or each.text == tokenizer.decode([each.token_id], skip_special_tokens=False)
    assert [(len(report.top), len(report.requested)) for report in requested_only.choices[0].logprobs] == [(0, 1)] * 8


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 64, "max_num_seqs": 8}], ids=["whole", "chunks"])
async def test_a_prompts_log_probabilities_come_before_the_output(settings: dict[str, int]) -> None:
    prompt = [7 * index % VOCAB_SIZE for index in range(300)]
    request = stream_request(prompt, 4, num_prompt_logprobs=2, num_choices=2)
    async with Services(**settings) as services:
        # The prompt is cached; it is computed again.
        await services.stream(stream_request(prompt, 1))
        streamed, unary = await services.stream(request), await services.generate(request)
        none = await services.stream(stream_request([1, 2, 3]))
    sequence = create_request(prompt=prompt, sampling=RowSampling(num_prompt_logprobs=2))
    truth = expected_prompt_logprobs(sequence, vocab_size=VOCAB_SIZE)
    assert streamed.prompt_logprobs == list(unary.prompt_logprobs)
    assert [report.token_id for report in unary.prompt_logprobs] == prompt[1:]
    assert [report.logprob for report in unary.prompt_logprobs] == truth.logprobs.tolist()
    assert [report.rank for report in unary.prompt_logprobs] == truth.ranks.tolist()
    top = [each for report in unary.prompt_logprobs for each in report.top]
    assert [each.token_id for each in top] == truth.top_token_ids.tolist()
    assert [each.logprob for each in top] == truth.top_logprobs.tolist()
    assert all(len(message.prompt_logprobs) <= 64 for message in streamed.messages)
    assert [choice.token_ids for choice in streamed.choices.values()] == [list(c.token_ids) for c in unary.choices]
    assert none.prompt_logprobs == []
