"""Checks the log-probabilities in answers: they must be those that the fake worker reports."""

from collections.abc import Sequence
from typing import Any

from tandem.v1 import inference_pb2
from tandem_shared.sampling_lists import SamplingLists
from tests.chaos.simulation.truths import check
from tests.chaos.simulation.wishes import VOCAB_SIZE, sampling_of
from tests.support.builders import create_request
from tests.support.fake_worker import expected_prompt_logprobs, rank_of, requested_logprobs


def check_logprobs(message: Any, request: inference_pb2.GenerateStreamRequest) -> None:
    """Checks for the log-probabilities that the fake worker reports: the token itself and the ids after it."""
    if not (request.output.HasField("num_logprobs") or request.output.logprob_token_ids):
        check(not message.logprobs, "log-probabilities that nobody asked for")
        return
    count, lists = request.output.num_logprobs, SamplingLists(logprob_token_ids=tuple(request.output.logprob_token_ids))
    requested = list(zip(lists.logprob_token_ids, requested_logprobs(lists), strict=True))
    expected = [
        (token_id, -0.5, rank_of(token_id), [((token_id + i) % VOCAB_SIZE, -0.5 - i) for i in range(count)], requested)
        for token_id in message.token_ids
    ]
    got = [(*_told(each), _pairs(each.requested)) for each in message.logprobs]
    check(got == expected, f"log-probabilities {got}, not {expected}")


def num_prompt_reports(request: inference_pb2.GenerateStreamRequest) -> int:
    """How many log-probabilities of the prompt must come."""
    return len(request.prompt.token_ids.ids) - 1 if request.output.HasField("num_prompt_logprobs") else 0


def check_prompt_logprobs(
    reports: Sequence[inference_pb2.TokenLogprob], request: inference_pb2.GenerateStreamRequest, num_before: int
) -> None:
    """Checks log-probabilities of the prompt that come after num_before others."""
    if not reports:
        return
    ids = request.prompt.token_ids.ids
    check(num_before + len(reports) <= num_prompt_reports(request), "too many log-probabilities of the prompt")
    truth = expected_prompt_logprobs(create_request(0, ids, sampling=sampling_of(request, 0)), vocab_size=VOCAB_SIZE)
    for index, each in enumerate(reports, num_before):
        tops = slice(index * truth.num_top, (index + 1) * truth.num_top)
        top = list(zip(truth.top_token_ids[tops], truth.top_logprobs[tops], strict=True))
        right = (ids[index + 1], truth.logprobs[index], truth.ranks[index], top)
        check(_told(each) == right, f"log-probabilities {_told(each)} of prompt position {index + 1}, not {right}")


def _told(each: inference_pb2.TokenLogprob) -> tuple[int, float, int, list[tuple[int, float]]]:
    return each.token_id, each.logprob, each.rank, _pairs(each.top)


def _pairs(tokens: Sequence[inference_pb2.TopLogprob]) -> list[tuple[int, float]]:
    return [(each.token_id, each.logprob) for each in tokens]
