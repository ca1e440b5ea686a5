"""Forms of outputs, all of which bound the length, and Python's own judges of whether an output has its form."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema

from tandem import StructuredOutput


@dataclass(frozen=True)
class Form:
    """A form that an output may have."""

    name: str
    output: StructuredOutput
    is_valid: Callable[[str], bool]

    def __str__(self) -> str:
        return self.name


def _schema(name: str, schema: dict[str, Any]) -> Form:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    return Form(name, StructuredOutput(json=schema), lambda text: validator.is_valid(json.loads(text)))


def _regex(name: str, regex: str) -> Form:
    return Form(name, StructuredOutput(regex=regex), lambda text: re.fullmatch(regex, text) is not None)


def _choice(name: str, texts: Sequence[str]) -> Form:
    return Form(name, StructuredOutput(choice=texts), lambda text: text in texts)


def _object(required: Sequence[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _is_sum(text: str) -> bool:
    """Whether the text is a sum or product of two to four numbers of up to three digits."""
    numbers = [node for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Constant)]
    return 2 <= len(numbers) <= 4 and all(0 <= number.value < 1000 for number in numbers)


def _is_tree(text: str) -> bool:
    """Whether the text is a list in parentheses of words and such lists, three levels deep at most."""
    for _ in range(3):
        text = re.sub(r"\([a-z]{1,4}( [a-z]{1,4}){0,2}\)", "x", text)
    return text == "x"


def _is_result(text: str) -> bool:
    value = json.loads(text.removeprefix("result = ").removesuffix(";"))
    return text.startswith("result = ") and text.endswith(";") and isinstance(value, list) and len(value) <= 2


NAME = {"type": "string", "minLength": 1, "maxLength": 10}
AGE = {"type": "integer", "minimum": 0, "maximum": 120}
TREE = """start: "(" item (" " item){0,2} ")"
item: WORD | "(" item2 (" " item2){0,2} ")"
item2: WORD | "(" WORD (" " WORD){0,2} ")"
WORD: /[a-z]{1,4}/
"""

RESULT = (
    'start: "result = " %json '
    + json.dumps(
        {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "x-guidance": {"whitespace_flexible": False}}
    )
    + ' ";"'
)

GREEK = "[α-ω]"  # noqa: RUF001 (Greek letters are meant)

FORMS = [
    _schema("person", _object(name=NAME, age=AGE)),
    _schema("nested", _object(person=_object(name=NAME, home=_object(town=NAME)), age=AGE)),
    _schema("enum", {"enum": ["red", "green", "blue"]}),
    _schema("mixed enum", {"enum": [1, "one", None, True, [1, 2], {"a": "b"}]}),
    _schema("const", _object(kind={"const": "sonnet"}, lines={"const": 14}, rhymes={"type": "boolean"})),
    _schema("null", _object(nothing={"type": "null"})),
    _schema("refs", {"$defs": {"n": NAME}, **_object(first={"$ref": "#/$defs/n"}, last={"$ref": "#/$defs/n"})}),
    _schema("ref to a part", _object(age=AGE, limit={"$ref": "#/properties/age"})),
    _schema("union", _object(value={"anyOf": [NAME, AGE, {"type": "null"}]})),
    _schema("types", _object(value={"type": ["boolean", "null"]})),
    _schema(
        "tagged union",
        {
            "anyOf": [
                _object(kind={"const": "circle"}, radius=AGE),
                _object(kind={"const": "square"}, side=AGE, colour={"enum": ["red", "blue"]}),
            ]
        },
    ),
    _schema("pattern", _object(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"})),
    _schema("pattern of words", {"type": "string", "pattern": "^(thou|thee) (art|hast) [a-z]{3,8}[.!]$"}),
    _schema("date", _object(born={"type": "string", "format": "date"})),
    _schema("address", {"type": "string", "format": "ipv4"}),
    _schema("unicode enum", {"enum": ["日本", "été", "ß", "😀", 'a "quoted" \\ word']}),
    _schema("unicode names", _object(**{"größe": AGE, "名前": {"enum": ["花子", "太郎"]}})),
    _schema("unicode pattern", {"type": "string", "pattern": f"^{GREEK}{{3,5}}$"}),
    _schema("numbers", {"type": "array", "items": AGE, "minItems": 1, "maxItems": 4}),
    _schema("tuple", {"type": "array", "prefixItems": [NAME, AGE], "items": False, "minItems": 2}),
    _schema("objects", {"type": "array", "items": _object(n=AGE), "minItems": 1, "maxItems": 2}),
    _schema("matrix", {"type": "array", "items": {"type": "array", "items": AGE, "maxItems": 2}, "maxItems": 2}),
    _schema("all of", {"allOf": [_object(["a"], a=AGE, b=AGE), {"required": ["b"]}]}),
    _schema("optional", _object(["name"], name=NAME, age=AGE, nick=NAME)),
    _schema("limits", {"type": "integer", "exclusiveMinimum": -50, "exclusiveMaximum": 50}),
    _schema("multiple", {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 25}),
    _regex("phone", r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}"),
    _regex("colour", r"#[0-9a-f]{6}"),
    _regex("sentence", r"[A-Z][a-z]{1,8}( [a-z]{1,8}){2,4}[.!?]"),
    _regex("greek", f"{GREEK}{{3,6}}( {GREEK}{{3,6}})?"),
    _regex("mail", r"[a-z]{1,8}(\.[a-z]{1,8})?@[a-z]{1,8}\.(com|org)"),
    _regex("lines", "(ROMEO|JULIET):\n[A-Z][a-z]{2,6}(, [a-z]{2,6}){1,2}\\.\n"),
    _choice("answers", ["yes", "no", "maybe"]),
    _choice("beginnings of each other", ["to", "to be", "to be or not", "to be or not to be"]),
    _choice("strange texts", ['"', "\\n", "line\nbreak", "日本", "/x/ | y", "😀😀"]),
    Form("sum", StructuredOutput(grammar="start: N (OP N){1,3}\nN: /0|[1-9][0-9]{0,2}/\nOP: /[-+*]/"), _is_sum),
    Form("tree", StructuredOutput(grammar=TREE), _is_tree),
    Form("schema in a grammar", StructuredOutput(grammar=RESULT), _is_result),
]
