"""Grammars of outputs that must call tools, or have a form after the model has thought.

They are in Lark's format, as the gRPC API's structured_output takes it. There `<think>` without quotes is the token of
that name, which a text in quotes is not. A model that may think may also leave it out; what it thinks is any text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tandem.structured_output import StructuredOutput
from tandem_gateway.output_parser import CALL, END_CALL, END_THINK, THINK
from tandem_gateway.problems import refuse
from tandem_gateway.protocol import Function

TAGS = (THINK, END_THINK, CALL, END_CALL)

THOUGHT = f"THOUGHT: /(.|\\n)*/\nthought: THOUGHT {END_THINK} SPACE?\n"
SPACE = "SPACE: /\\n{1,2}/\n"


ARGUMENTS_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
"""Arguments are written as models see them written in their templates, where a tool was called before."""

ANSWER_OPTIONS = {
    "whitespace_pattern": r" |\n {0,40}", "item_separator": ",", "key_separator": ":", "lenient": False,
}  # fmt: skip
"""Answers may have the space that the gRPC API's json_schema allows."""


def calls_grammar(
    functions: Sequence[Function], *, is_single: bool, thinking: str, tokens: frozenset[str]
) -> StructuredOutput:
    """The form of an output that calls some of the functions: one call, or one or several. thinking: "no", "may", or
    "opened" if the prompt has opened a thought. tokens: the tags that are tokens of the model.
    """
    start, end = (tag if tag in tokens else json.dumps(tag) for tag in (CALL, END_CALL))
    rules = [_start(thinking, "call" if is_single else 'call ("\\n" call)*')]
    rules.append(f"call: {start} (" + " | ".join(f"call_{index}" for index in range(len(functions))) + f") {end}\n")
    for index, function in enumerate(functions):
        head = f'\n{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        rules.append(f'call_{index}: {json.dumps(head, ensure_ascii=False)} arguments_{index} "}}\\n"\n')
        rules.append(f"arguments_{index}: %json {_schema(function)}\n")
    return StructuredOutput(grammar="".join(rules))


def after_thinking(form: StructuredOutput, *, thinking: str) -> StructuredOutput:
    """The form for an output whose reasoning is free. Raises InvalidRequest for a form that is a grammar itself."""
    if thinking == "no":
        return form
    if form.json is not None or form.json_object:
        body = f"%json {_answer_schema(form)}"
    elif form.choice is not None:
        body = " | ".join(map(json.dumps, form.choice))
    elif form.regex is not None:
        # A slash ends an expression in Lark's format, unless it is escaped, as it may be already.
        body = "/" + re.sub(r"(\\.)|/", lambda match: match[1] or "\\/", form.regex, flags=re.DOTALL) + "/"
    else:
        raise refuse("structured_output", "needs enable_thinking to be false, as the model may think first")
    return StructuredOutput(grammar=f"{_start(thinking, 'answer')}answer: {body}\n")


def _start(thinking: str, body: str) -> str:
    if thinking == "no":
        return f"start: {body}\n"
    first = f"({THINK} thought)?" if thinking == "may" else "thought"
    return f"start: {first} body\n{THOUGHT}{SPACE}body: {body}\n"


def _schema(function: Function) -> str:
    schema: dict[str, Any] = function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    # The arguments are an object, whether or not the schema says so.
    typed = schema if "type" in schema else {**schema, "type": "object"}
    return _dumped(typed | {"x-guidance": ARGUMENTS_OPTIONS}, "tools")


def _answer_schema(form: StructuredOutput) -> str:
    schema: Any = form.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise refuse("structured_output", f"is no JSON: {error}") from error
    if schema is None:
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise refuse("structured_output", "must be a JSON object")
    return _dumped(schema | {"x-guidance": ANSWER_OPTIONS}, "structured_output")


def _dumped(schema: dict[str, Any], param: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise refuse(param, f"has a schema that is no JSON: {error}") from error
