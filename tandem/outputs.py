"""What LLM returns: replies with the names of vLLM's RequestOutput, which can also be read as nano-vllm's dicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.v1 import inference_pb2
from tandem_shared.errors import TandemError

FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural log-probability of a token. rank is 1 for the likeliest token, and None for a token that is neither
    the one in this place nor among the likeliest. decoded_token is the token's text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One output of a prompt."""

    index: int
    """Which of the prompt's outputs this is, from 0."""
    text: str
    token_ids: list[int]
    """The output's tokens, with the one that ended it, if any."""
    cumulative_logprob: float | None
    """The sum of the tokens' log-probabilities; None if they were not asked for."""
    logprobs: list[dict[int, Logprob]] | None
    """For each token of the output, the log-probabilities in its place by token; None if they were not asked for."""
    finish_reason: str | None
    """"stop", "length" or "abort"."""
    stop_reason: str | int | None
    """The stop string or the token that ended the output, if finish_reason is "stop"."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All outputs of a prompt. output["text"] and output["token_ids"] are those of the first one."""

    request_id: str
    prompt: str | None
    """The prompt's text; None if token ids or messages were given."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """For each token of the prompt, the log-probabilities in its place by token; None for the first token. None if they
    were not asked for."""
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Tokens of the prompt that were in the prefix cache, summed over the outputs."""
    finished: bool = True

    def __getitem__(self, name: str) -> Any:
        if name not in ("text", "token_ids"):
            raise KeyError(f"{name!r}: an output has 'text' and 'token_ids'; all else are attributes")
        return getattr(self.outputs[0], name)


class PromptsFailed(TandemError):
    """Some of several prompts failed. The others were completed, and nothing of them is lost.

    errors: the error of each prompt that failed, by the prompt's index. outputs: as LLM.generate returns them, with
    None in place of those that failed.
    """

    def __init__(self, errors: Mapping[int, Exception], outputs: Sequence[RequestOutput | None]) -> None:
        index, first = min(errors.items())
        super().__init__(f"{len(errors)} of {len(outputs)} prompts failed; prompts[{index}]: {text_of(first)}")
        self.errors = dict(errors)
        self.outputs = list(outputs)


def text_of(error: Exception) -> str:
    """What an error says in a line: of a gRPC status, its details."""
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)


def read_reply(
    reply: inference_pb2.GenerateResponse, prompt: str | None, prompt_token_ids: list[int], *, has_prompt_logprobs: bool
) -> RequestOutput:
    """The output of a reply. has_prompt_logprobs: whether the request asked for them; the reply to a prompt of one
    token does not tell.
    """
    return RequestOutput(
        request_id=reply.request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=[None, *map(_read_report, reply.prompt_logprobs)] if has_prompt_logprobs else None,
        outputs=[_read_choice(choice) for choice in reply.choices],
        num_cached_tokens=reply.usage.num_cached_tokens,
    )


def _read_choice(choice: inference_pb2.Choice) -> CompletionOutput:
    reports = choice.logprobs
    matched = choice.finish.WhichOneof("matched_stop")
    return CompletionOutput(
        index=choice.choice_index,
        text=choice.text,
        token_ids=list(choice.token_ids),
        cumulative_logprob=sum(report.logprob for report in reports) if reports else None,
        logprobs=[_read_report(report) for report in reports] if reports else None,
        finish_reason=FINISH_REASONS[choice.finish.reason],
        stop_reason=getattr(choice.finish, matched) if matched else None,
    )


def _read_report(report: inference_pb2.TokenLogprob) -> dict[int, Logprob]:
    """The log-probabilities in one place: first of the token that is there, then of the likeliest, then of those that
    the request named.
    """
    read = {report.token_id: Logprob(report.logprob, report.rank, report.text)}
    for rank, each in enumerate(report.top, 1):
        read.setdefault(each.token_id, Logprob(each.logprob, rank, each.text))
    for each in report.requested:
        read.setdefault(each.token_id, Logprob(each.logprob, None, each.text))
    return read
