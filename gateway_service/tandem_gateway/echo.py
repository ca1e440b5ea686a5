"""The prompt before its output, as /v1/completions gives it where `echo` is true."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tandem.calls import build
from tandem.v1 import inference_pb2
from tandem_gateway.engine import Engine, Fields, Metadata
from tandem_gateway.logprobs import completion_logprobs


@dataclass
class Echo:
    """One prompt, as its outputs repeat it."""

    text: str
    first_token: str | None
    """The text of the prompt's first token, which has no log-probability. None if none are asked for."""
    tokens: list[inference_pb2.TokenLogprob] = field(default_factory=list)
    """The prompt's other tokens, as far as the scheduler has told of them."""

    def num_characters(self) -> int:
        """Where the first token of an output begins in its text, as text_offset counts."""
        return len(self.first_token or "") + sum(len(each.text) for each in self.tokens)

    def put_before(self, choice: dict[str, Any]) -> None:
        """Puts the prompt before the output of a choice."""
        choice["text"] = self.text + choice["text"]
        if self.first_token is not None:
            first: dict[str, list[Any]] = {
                "tokens": [self.first_token], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0],
            }  # fmt: skip
            parts = [first, completion_logprobs(self.tokens, len(self.first_token)), choice["logprobs"] or {}]
            choice["logprobs"] = {name: [each for part in parts for each in part.get(name, ())] for name in first}


async def read_echo(engine: Engine, prompt: Fields, metadata: Metadata, *, has_logprobs: bool) -> Echo:
    """prompt: the field of a gRPC request, {"text": ...} or {"token_ids": {"ids": ...}}. Raises InvalidRequest."""
    if "text" in prompt:
        ids: Iterable[int] = ()
        if has_logprobs:
            ids = await engine.tokenize(build(inference_pb2.TokenizeRequest, text=prompt["text"]), metadata)
        text = prompt["text"]
    else:
        ids = prompt["token_ids"]["ids"]
        text = await _text(engine, ids, metadata)
    return Echo(text, await _text(engine, list(ids)[:1], metadata) if has_logprobs else "")


async def _text(engine: Engine, ids: Iterable[int], metadata: Metadata) -> str:
    request = build(inference_pb2.DetokenizeRequest, token_ids=ids, skip_special_tokens=False)
    return await engine.detokenize(request, metadata)
