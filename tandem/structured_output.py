"""The form that an output must have, with vLLM's names."""

import json as json_module
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.v1 import inference_pb2
from tandem_shared.errors import FieldViolation, InvalidRequest
from tandem_shared.sampling_fields import UINT32_MAX

MAX_SHOWN_CHARACTERS = 80

KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """Exactly one of the fields but the last must be set. protos/tandem/v1/inference.proto says what they mean.

    Raises InvalidRequest, which names every wrong field. Whether a schema, an expression or a grammar is right is
    checked by the server.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema, as JSON or as the object that this JSON is."""
    json_object: bool | None = None
    """If True, any JSON object."""
    regex: str | None = None
    choice: Sequence[str] | None = None
    """The possible outputs."""
    grammar: str | None = None
    """A grammar in Lark's format."""
    start_after_token_id: int | None = None
    """The output is free up to and with the first such token, for example the one that ends a model's reasoning."""

    def __post_init__(self) -> None:
        if violations := [FieldViolation(name, problem) for name, problem in self._problems().items() if problem]:
            raise InvalidRequest(*violations)

    def message(self) -> inference_pb2.StructuredOutput:
        return inference_pb2.StructuredOutput(
            json_schema=self._json_text(),
            json_object=self.json_object or None,
            regex=self.regex,
            choice=None if self.choice is None else inference_pb2.Choices(texts=self.choice),
            lark=self.grammar,
            start_after_token_id=self.start_after_token_id,
        )

    def _json_text(self) -> str | None:
        return json_module.dumps(self.json, allow_nan=False) if isinstance(self.json, Mapping) else self.json

    def _problems(self) -> dict[str, str]:
        """Field -> what is wrong with its value, "" if nothing is."""
        num_set = sum(getattr(self, name) not in (None, False) for name in KINDS)
        id_ = self.start_after_token_id
        is_id = isinstance(id_, numbers.Integral) and not isinstance(id_, bool) and 0 <= id_ <= UINT32_MAX
        return {
            "json": self._json_problem(),
            "json_object": "" if isinstance(self.json_object, bool | None) else "must be True, False or None",
            "regex": _text_problem(self.regex),
            "choice": self._choice_problem(),
            "grammar": _text_problem(self.grammar),
            "start_after_token_id": "" if id_ is None or is_id else f"must be a token id, is {shown(id_)}",
            "structured_outputs": "" if num_set == 1 else f"must have exactly one of {', '.join(KINDS)}, has {num_set}",
        }

    def _json_problem(self) -> str:
        if not isinstance(self.json, Mapping):
            return _text_problem(self.json)
        try:
            self._json_text()
        except (TypeError, ValueError, RecursionError) as error:
            return f"is no JSON: {error}"
        return ""

    def _choice_problem(self) -> str:
        if self.choice is None:
            return ""
        is_right = isinstance(self.choice, list | tuple) and len(self.choice) > 0
        if is_right and all(isinstance(text, str) and text and not _text_problem(text) for text in self.choice):
            return ""
        return "must be a list of texts, none of them empty"


def shown(value: object) -> str:
    """A value for an error message, cut to a length that can be read."""
    try:
        text = repr(value)
    except ValueError:
        # Python makes no text of numbers with thousands of digits.
        return f"a long {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _text_problem(text: Any) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        return f"must be a string, is of type {type(text).__name__}"
    return "must be Unicode without lone surrogates" if any("\ud800" <= c <= "\udfff" for c in text) else ""
