"""How to sample and when to stop, with vLLM's names."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from tandem.structured_output import StructuredOutput, shown
from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_fields import FLOAT32_MAX, REQUEST_FIELDS, UINT32_MAX, SamplingField
from tandem_shared.sampling_lists import BIAS_LIMIT


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
    logit_bias: Mapping[int | str, float] | None = None
    """Token -> what is added to its logit. A token may be given as a string of digits, as JSON has it."""
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    """With a number, each token's log-probability is reported, and those of that many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt but the first."""
    logprob_token_ids: Sequence[int] | None = None
    """Tokens whose log-probabilities are reported in each place of the output."""
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutput | None = None
    detokenize: InitVar[bool | None] = None
    """vLLM's. An output has its text always."""
    spaces_between_special_tokens: InitVar[bool | None] = None
    """vLLM's. Has no effect, as it has none in vLLM with a tokenizer of the kind that Tandem reads."""

    def __post_init__(self, detokenize: bool | None, spaces_between_special_tokens: bool | None) -> None:
        problems = [(name, check(getattr(self, name))) for name, check in _CHECKS.items()]
        violations = [FieldViolation(name, problem) for name, problem in problems if problem]
        if not violations and self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            description = f"must be at most max_tokens, {self.max_tokens}, is {self.min_tokens}"
            violations = [FieldViolation("min_tokens", description)]
        if violations:
            raise InvalidRequest(*violations)

    def sampling(self) -> inference_pb2.SamplingParams:
        values = {field.name: getattr(self, field.name) for field in REQUEST_FIELDS}
        if self.top_k == -1:
            values["top_k"] = 0
        return inference_pb2.SamplingParams(
            **values,
            logit_bias={int(token_id): float(bias) for token_id, bias in (self.logit_bias or {}).items()},
            bad_words=self.bad_words,
            allowed_token_ids=self.allowed_token_ids,
        )

    def stopping(self) -> inference_pb2.StoppingCriteria:
        return inference_pb2.StoppingCriteria(
            max_tokens=self.max_tokens,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            include_stop_string=self.include_stop_str_in_output,
        )

    def output(self) -> inference_pb2.OutputOptions:
        return inference_pb2.OutputOptions(
            num_logprobs=self.logprobs,
            num_prompt_logprobs=self.prompt_logprobs,
            logprob_token_ids=self.logprob_token_ids,
            skip_special_tokens=self.skip_special_tokens,
        )

    def structured_output(self) -> inference_pb2.StructuredOutput | None:
        return None if self.structured_outputs is None else self.structured_outputs.message()


def _whole(minimum: int, maximum: float = UINT32_MAX, hint: str = "") -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if _is_whole(value) and minimum <= value <= maximum:
            return ""
        return f"must be a whole number from {minimum} to {maximum}{hint}, is {shown(value)}"

    return _unless_none(check)


def _number(field: SamplingField) -> Callable[[Any], str]:
    is_bounded = field.most < FLOAT32_MAX
    text = (
        f"a number {field.range_text}"
        if is_bounded
        else f"a finite number, {field.range_text.removesuffix(' and finite')}"
    )

    def check(value: Any) -> str:
        return "" if _is_number(value) and field.allows(value) else f"must be {text}, is {shown(value)}"

    return _unless_none(check)


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else f"must be True, False or None, is {shown(value)}"


def _stop(value: Any) -> str:
    return _texts([value] if isinstance(value, str) else value, "a string or a list of strings")


def _texts(value: Any, what: str = "a list of strings") -> str:
    for text in value if isinstance(value, list | tuple) else [None]:
        if not isinstance(text, str) or not text:
            return f"must be {what}, none of them empty, is {shown(value)}"
        if not _is_unicode(text):
            return f"must be Unicode without lone surrogates, is {shown(text)}"
    return ""


def _token_ids(value: Any) -> str:
    if isinstance(value, list | tuple) and all(_is_whole(each) and 0 <= each <= UINT32_MAX for each in value):
        return ""
    return f"must be a list of token ids, is {shown(value)}"


def _allowed(value: Any) -> str:
    return "must be None, which allows all tokens, or have some" if value == () or value == [] else _token_ids(value)


def _bias(value: Any) -> str:
    problem = f"must be a mapping of token ids to numbers in [-{BIAS_LIMIT:g}, {BIAS_LIMIT:g}]"
    if not isinstance(value, Mapping):
        return f"{problem}, is {shown(value)}"
    for token_id, bias in value.items():
        is_digits = isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() and len(token_id) <= 10
        is_id = (is_digits or _is_whole(token_id)) and 0 <= int(token_id) <= UINT32_MAX
        if not (is_id and _is_number(bias) and -BIAS_LIMIT <= bias <= BIAS_LIMIT):
            return f"{problem}, has {shown(token_id)}: {shown(bias)}"
    return "" if len(set(map(int, value))) == len(value) else "has a token twice"


def _form(value: Any) -> str:
    return "" if isinstance(value, StructuredOutput) else f"must be a StructuredOutput or None, is {shown(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _unless_none(check: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value is None else check(value)


_CHECKS: dict[str, Callable[[Any], str]] = {
    "n": _whole(1),
    **{each.name: _number(each) if each.kind is float else _whole(0, each.most) for each in REQUEST_FIELDS},
    "top_k": _whole(-1, hint=", where 0 and -1 are all tokens"),
    "logit_bias": _unless_none(_bias),
    "bad_words": _unless_none(_texts),
    "allowed_token_ids": _unless_none(_allowed),
    "max_tokens": _whole(1),
    "min_tokens": _whole(0),
    "stop": _unless_none(_stop),
    "stop_token_ids": _unless_none(_token_ids),
    "include_stop_str_in_output": _unless_none(_flag),
    "ignore_eos": _unless_none(_flag),
    "logprobs": _whole(0),
    "prompt_logprobs": _whole(0),
    "logprob_token_ids": _unless_none(_token_ids),
    "skip_special_tokens": _unless_none(_flag),
    "structured_outputs": _unless_none(_form),
}
"""Field -> a function that says what is wrong with a value, "" if nothing is. Only values that no server could take are
wrong here; a server's own limits are checked by the server.
"""
