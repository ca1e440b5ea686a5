"""Log-probabilities in the three forms that HTTP APIs have: of chats, of completions, and vLLM's of prompts."""

from collections.abc import Iterable
from typing import Any

from tandem.v1 import inference_pb2

TokenLogprobs = Iterable[inference_pb2.TokenLogprob]


def chat_logprobs(tokens: TokenLogprobs) -> dict[str, Any]:
    """The logprobs of a chat's choice."""
    return {"content": [{**_entry(each), "top_logprobs": [_entry(top) for top in each.top]} for each in tokens]}


def completion_logprobs(tokens: TokenLogprobs, offset: int) -> dict[str, Any]:
    """The logprobs of a completion's choice, whose first token begins `offset` characters into its text."""
    texts: list[str] = []
    offsets: list[int] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    for each in tokens:
        texts.append(each.text)
        offsets.append(offset)
        logprobs.append(each.logprob)
        # As in vLLM the sampled token is always among them.
        tops.append({**{top.text: top.logprob for top in each.top}, each.text: each.logprob})
        offset += len(each.text)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(tokens: TokenLogprobs, *, is_start: bool = True) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each token, it and the likeliest ones by their ids. The prompt's first token has
    None; is_start says whether it is among those that are told of.
    """
    result: list[dict[str, Any] | None] = [None] if is_start else []
    for each in tokens:
        entry = {
            str(top.token_id): {"logprob": top.logprob, "rank": rank, "decoded_token": top.text}
            for rank, top in enumerate(each.top, 1)
        }
        entry[str(each.token_id)] = {"logprob": each.logprob, "rank": each.rank, "decoded_token": each.text}
        result.append(entry)
    return result


def _entry(token: inference_pb2.TokenLogprob | inference_pb2.TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.token_bytes)}
