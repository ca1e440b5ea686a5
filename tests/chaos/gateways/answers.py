"""What an HTTP answer says, whether it came whole or as events, so that one can be held against the other."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.gateways.requests import RESPONSES

LOGPROB_TOLERANCE = 1e-5
"""Log-probabilities are float32 on the wire, and the order of their sums depends on the batch."""
DELTAS = {
    "response.output_text.delta": "message",
    "response.reasoning_text.delta": "reasoning",
    "response.function_call_arguments.delta": "function_call",
}
PARTS = ("texts", "tokens", "numbers of log-probabilities", "finish reasons", "usage")
ENDS = ("response.completed", "response.incomplete")


class WrongAnswer(Exception):
    """An answer that differs from its request's true one."""


@dataclass
class Answer:
    """Keys of texts are a choice (or an item of a response) and which of its texts."""

    texts: defaultdict[tuple[Any, ...], str] = field(default_factory=lambda: defaultdict(str))
    tokens: defaultdict[tuple[Any, ...], list[str]] = field(default_factory=lambda: defaultdict(list))
    logprobs: defaultdict[tuple[Any, ...], list[float]] = field(default_factory=lambda: defaultdict(list))
    finishes: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    num_events: int = 0

    def add(self, path: str, said: dict[str, Any]) -> None:
        """Adds an event of a stream, or a whole answer. Raises WrongAnswer for what can't follow what came before."""
        if path == RESPONSES:
            self._add_response(said)
            return
        for choice in said["choices"]:
            self._add_choice(choice)
        if "prompt_logprobs" in said:
            self._add_prompt(said["prompt_logprobs"])
        if usage := said.get("usage"):
            self._end(usage["prompt_tokens"], usage["completion_tokens"])

    def check(self, truth: "Answer", *, is_ended: bool) -> None:
        """Raises WrongAnswer if this is not a beginning of the true answer or, once ended, not the whole of it."""
        for key, text in self.texts.items():
            right = truth.texts.get(key, "")
            if not right.startswith(text):
                at = next(i for i, (a, b) in enumerate(zip(text, right + "\0" * len(text), strict=False)) if a != b)
                raise WrongAnswer(f"{key}: from character {at} on {text[at : at + 40]!r}, not {right[at : at + 40]!r}")
        for key, tokens in self.tokens.items():
            if tokens != truth.tokens.get(key, [])[: len(tokens)]:
                raise WrongAnswer(f"other tokens of {key}")
        for key, logprobs in self.logprobs.items():
            for each, right_one in zip(logprobs, truth.logprobs.get(key, []), strict=False):
                if abs(each - right_one) > LOGPROB_TOLERANCE:
                    raise WrongAnswer(f"log-probability {each} of {key}, not {right_one}")
        if is_ended:
            for what, got, right_part in zip(PARTS, self._whole(), truth._whole(), strict=True):
                if got != right_part:
                    raise WrongAnswer(f"ended with other {what}: {str(got)[:200]}, not {str(right_part)[:200]}")

    def _whole(self) -> tuple[Any, ...]:
        """The PARTS of a whole answer. The log-probabilities themselves are compared one by one."""
        texts = {key: text for key, text in self.texts.items() if text}
        counts = {key: len(each) for key, each in self.logprobs.items() if each}
        return texts, dict(self.tokens), counts, self.finishes, self.usage

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        if index in self.finishes:
            raise WrongAnswer(f"news of choice {index} after its end")
        said = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        self.texts[index, "content"] += said.get("content") or ""
        self.texts[index, "reasoning"] += said.get("reasoning_content") or ""
        for position, call in enumerate(said.get("tool_calls") or ()):
            number = call.get("index", position)
            self.texts[index, "name", number] += call["function"].get("name") or ""
            self.texts[index, "arguments", number] += call["function"].get("arguments") or ""
        if logprobs := choice.get("logprobs"):
            self._add_logprobs(index, logprobs)
        # A stream has them once for each prompt, a whole answer for each choice.
        if "prompt_logprobs" in choice and index == 0:
            self._add_prompt(choice["prompt_logprobs"])
        if choice["finish_reason"] is not None:
            self.finishes[index] = (choice["finish_reason"], choice["stop_reason"])

    def _add_logprobs(self, index: int, logprobs: dict[str, Any]) -> None:
        if "content" in logprobs:
            for each in logprobs["content"]:
                self.tokens[index, "output"].append(each["token"])
                self.logprobs[index, "output"] += [each["logprob"], *(top["logprob"] for top in each["top_logprobs"])]
            return
        self.tokens[index, "output"] += logprobs["tokens"]
        self.tokens[index, "offsets"] += map(str, logprobs["text_offset"])
        self.logprobs[index, "output"] += logprobs["token_logprobs"]

    def _add_prompt(self, entries: list[dict[str, Any] | None]) -> None:
        for entry in entries:
            self.tokens[0, "prompt"].append(" ".join(entry or ()))
            self.logprobs[0, "prompt"] += [each["logprob"] for each in (entry or {}).values()]

    def _add_response(self, said: dict[str, Any]) -> None:
        if self.usage is not None:
            raise WrongAnswer(f"{said.get('type')} after the end")
        kind = said.get("type")
        if kind is None:
            for index, item in enumerate(said["output"]):
                parts = item.get("content") or [{"text": item.get("arguments")}]
                self.texts[index, item["type"]] += "".join(part["text"] for part in parts)
        elif kind in DELTAS:
            self.texts[said["output_index"], DELTAS[kind]] += said["delta"]
        response = said.get("response", {}) if kind in ENDS else said
        if kind is None or kind in ENDS:
            self.finishes[0] = (response["status"],)
            self._end(response["usage"]["input_tokens"], response["usage"]["output_tokens"])

    def _end(self, num_prompt: int, num_output: int) -> None:
        if self.usage is not None:
            raise WrongAnswer("a second usage")
        self.usage = (num_prompt, num_output)
