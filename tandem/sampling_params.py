"""How to sample and when to stop, with vLLM's names."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_fields import FLOAT32_MAX, REQUEST_FIELDS, UINT32_MAX, SamplingField


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """A field that is None takes the model's default or, where the model has none, the API's, which
    protos/tandem/v1/inference.proto gives.

    Raises InvalidRequest, which names every field whose value no server takes.
    """

    n: int | None = None
    """The number of independent outputs of the prompt."""
    # The table's fields are written out from here to seed, for type checkers and editors.
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    """With a number, each token's log-probability is reported, and those of that many most likely tokens."""
    skip_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        problems = [(name, check(getattr(self, name))) for name, check in _CHECKS.items()]
        if violations := [FieldViolation(name, problem) for name, problem in problems if problem]:
            raise InvalidRequest(*violations)

    def sampling(self) -> inference_pb2.SamplingParams:
        return inference_pb2.SamplingParams(**{field.name: getattr(self, field.name) for field in REQUEST_FIELDS})

    def stopping(self) -> inference_pb2.StoppingCriteria:
        return inference_pb2.StoppingCriteria(
            max_tokens=self.max_tokens,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )

    def output(self) -> inference_pb2.OutputOptions:
        return inference_pb2.OutputOptions(num_logprobs=self.logprobs, skip_special_tokens=self.skip_special_tokens)


def _whole(minimum: int, maximum: float = UINT32_MAX, hint: str = "") -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if _is_whole(value) and minimum <= value <= maximum:
            return ""
        return f"must be a whole number from {minimum} to {maximum}{hint}, is {value!r}"

    return _unless_none(check)


def _number(field: SamplingField) -> Callable[[Any], str]:
    is_bounded = field.most < FLOAT32_MAX
    text = (
        f"a number {field.range_text}"
        if is_bounded
        else f"a finite number, {field.range_text.removesuffix(' and finite')}"
    )

    def check(value: Any) -> str:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return "" if is_number and field.allows(value) else f"must be {text}, is {value!r}"

    return _unless_none(check)


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else f"must be True, False or None, is {value!r}"


def _strings(value: Any) -> str:
    for text in [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else [None]:
        if not isinstance(text, str) or not text:
            return f"must be a string or a tuple of strings, none of them empty, is {value!r}"
        if not _is_unicode(text):
            return f"must be Unicode without lone surrogates, is {text!r}"
    return ""


def _token_ids(value: Any) -> str:
    if isinstance(value, list | tuple) and all(_is_whole(each) and 0 <= each <= UINT32_MAX for each in value):
        return ""
    return f"must be a tuple of token ids, is {value!r}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _unless_none(check: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value is None else check(value)


_CHECKS: dict[str, Callable[[Any], str]] = {
    "n": _whole(1),
    **{each.name: _number(each) if each.kind is float else _whole(0, each.most) for each in REQUEST_FIELDS},
    "top_k": _whole(0, hint=", where 0 is all tokens"),
    "max_tokens": _whole(1),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _unless_none(_flag),
    "logprobs": _whole(0),
    "skip_special_tokens": _unless_none(_flag),
}
"""Field -> a function that says what is wrong with a value, "" if nothing is. Only values that no server could take are
wrong here; a server's own limits are checked by the server.
"""
