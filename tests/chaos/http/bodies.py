"""Hostile bodies of HTTP requests, made from the gateway's own OpenAPI document, so that a new path or field is among
them by itself.

A body is text in which one place, or some, have a fragment that may be no JSON at all. Half of the bodies sweep over
all fields at every depth, and have a fragment where the schema says something else. The others are valid requests in
which some things are changed, or whose bytes are.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tandem_gateway.app import make_app
from tandem_gateway.protocol import UNSUPPORTED, WITHOUT_EFFECT
from tandem_shared.gateway_settings import GatewaySettings
from tests.chaos.gateways.requests import KINDS, make_request
from tests.chaos.messages.hostile_bytes import draw

FRAGMENTS = [
    *(b"null", b"true", b"false", b"-1", b"0", b"1", b"1.5", b"-0.0", b"2147483648", b"9223372036854775808"),
    *(b"18446744073709551616", b"1e308", b"1e400", b"-1e400", b"1e-400", b"1e" + b"9" * 20, b"9" * 5000),
    *(b"NaN", b"Infinity", b"-Infinity", b'""', b'"x"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"a\0b"'),
    *(b'"\xff"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"' + b"a" * 20_000 + b'"', b'"\\x41"', b'"'),
    *(b"[]", b"{}", b"[[]]", b"[null]", b"[{}]", b'{"a": []}', b'{"": null}', b'{"type": "object", "type": 1}'),
    *(b'{"$ref": "#"}', b"[" * 90 + b"]" * 90, b"[" * 900 + b"]" * 900, b"[" * 100_000 + b"]" * 100_000),
    *(b'{"a":' * 900 + b"1" + b"}" * 900, b"[" + b"0," * 20_000 + b"0]", b"[" + b'"a",' * 300 + b'"a"]'),
    *(b'["a", 1, null, {}]', b"01", b".5", b"+1", b"'a'", b"undefined", b"/**/1", b""),
]
"""What a place may have instead of what belongs there."""
MARK = "\ue000{}\ue000"
WRITTEN_MARK = re.compile(rb'"\\ue000(\d+)\\ue000"')
MAX_DEPTH = 7
NUM_TOKENS = 2
LIMITS = ("max_tokens", "max_output_tokens")

Case = tuple[str, bytes]
"""Path and body."""


@dataclass(frozen=True)
class Schemas:
    """The bodies that the paths take, as JSON schemas."""

    paths: dict[str, Any]
    parts: dict[str, Any]

    @classmethod
    def of_gateway(cls) -> "Schemas":
        document = make_app(GatewaySettings()).openapi()
        posts = {path: methods["post"] for path, methods in document["paths"].items() if "post" in methods}
        bodies = {path: post["requestBody"]["content"]["application/json"]["schema"] for path, post in posts.items()}
        return cls(bodies, document["components"]["schemas"])

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        return self.parts[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    def limit(self, path: str) -> dict[str, int]:
        """Fields that keep an answer short. Without them chats go on to the end of the context."""
        return {name: NUM_TOKENS for name in LIMITS if name in self.resolve(self.paths[path])["properties"]}

    def least(self, schema: dict[str, Any]) -> Any:
        """The smallest value of the schema."""
        schema = self.resolve(schema)
        if kinds := schema.get("anyOf") or schema.get("oneOf"):
            return self.least(kinds[0])
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if schema.get("type") == "object":
            return {name: self.least(schema["properties"][name]) for name in schema.get("required", ())}
        if schema.get("type") == "array":
            return [self.least(schema["items"])]
        return {"string": "a", "integer": 1, "number": 1.0, "boolean": False}.get(schema.get("type", ""))

    def values(self, schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
        """Values of the schema, or what has a mark in it."""
        schema = self.resolve(schema)
        if kinds := schema.get("anyOf") or schema.get("oneOf"):
            return st.one_of([self.values(kind, depth) for kind in kinds])
        if "const" in schema or "enum" in schema:
            return st.sampled_from([schema["const"]] if "const" in schema else schema["enum"])
        if depth > MAX_DEPTH:
            return marks
        if schema.get("type") == "object" and "properties" in schema:
            fields = schema["properties"]
            needed = {name: self.values(fields[name], depth + 1) for name in schema.get("required", ())}
            others = st.fixed_dictionaries(
                {}, optional={name: self.values(each, depth + 1) for name, each in fields.items() if name not in needed}
            )
            few = st.tuples(others, st.randoms(use_true_random=False)).map(lambda drawn: _some(*drawn))
            return st.tuples(st.fixed_dictionaries(needed), few).map(lambda pair: {**pair[0], **pair[1]})
        if schema.get("type") == "array":
            return st.lists(self.values(schema["items"], depth + 1), max_size=3)
        return SCALARS.get(schema.get("type", ""), anything) | marks

    def spoiled(self, schema: dict[str, Any], depth: int = 0) -> Iterator[Any]:
        """Values of the schema in each of which one place, at any depth, has the mark of each fragment in turn."""
        schema = self.resolve(schema)
        yield from map(MARK.format, range(len(FRAGMENTS)))
        if depth > MAX_DEPTH:
            return
        for kind in map(self.resolve, schema.get("anyOf", schema.get("oneOf", [schema]))):
            for name, field in kind.get("properties", {}).items():
                yield from ({**self.least(kind), name: value} for value in self.spoiled(field, depth + 1))
            if others := kind.get("additionalProperties"):
                # True stands for anything.
                inner = others if isinstance(others, dict) else {}
                yield from ({name: value} for name in ("a", "\ud800") for value in self.spoiled(inner, MAX_DEPTH))
            if kind.get("type") == "array":
                yield from ([value] for value in self.spoiled(kind["items"], depth + 1))


marks = st.integers(0, len(FRAGMENTS) - 1).map(MARK.format)
texts = st.sampled_from(["", "a", "\0", "<think>", "<|im_end|>", "\u202e", "{", "(", "[a-", "😀"]) | st.text(max_size=9)
integers = st.sampled_from([-(2**63), -1, 0, 1, 2, 64, 65, 1023, 1024, 2**31, 2**53]) | st.integers(-3, 1100)
numbers = st.sampled_from([-2.0, -0.1, 0.0, 0.5, 1.0, 2.0, 1e-9, 1e300]) | st.floats(allow_nan=False, width=32)
anything = st.recursive(
    st.none() | st.booleans() | integers | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
SCALARS = {"string": texts, "integer": integers, "number": numbers, "boolean": st.booleans(), "null": st.none()}


def _some(fields: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """A few of the fields, as a body in which many are wrong says no more than one in which a few are."""
    return {name: fields[name] for name in source.sample(sorted(fields), min(len(fields), source.randint(0, 4)))}


def valid_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Short requests of every kind."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"a": 1}'}}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "What hour is it?"}]},
        {"role": "assistant", "reasoning_content": "Look.", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "nine"},
    ]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "What hour is it?"}]},
        {"type": "function_call", "call_id": "call_1", "name": "get_time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "nine"},
    ]
    found = [make_request(number, NUM_TOKENS) for number in range(2 * len(KINDS))]
    for _, body in found:
        body.update({name: 8 for name in LIMITS if name in body})
    return [
        *found,
        ("/v1/chat/completions", {"messages": talk, "max_tokens": 2}),
        ("/v1/responses", {"input": items, "max_output_tokens": 2, "instructions": "Be brief.", "tools": []}),
        ("/tokenize", {"prompt": "ROMEO"}),
        ("/tokenize", {"messages": talk, "add_generation_prompt": True}),
        ("/detokenize", {"tokens": [1, 2]}),
    ]


def draw_bodies(count: int, seed: int) -> list[Case]:
    """`count` paths with their bodies."""
    schemas, source = Schemas.of_gateway(), random.Random(seed)
    spoiled = [(path, value) for path, schema in schemas.paths.items() for value in schemas.spoiled(schema)]
    drawn: list[Case] = []
    for path, value in source.sample(spoiled, min(len(spoiled), count // 2)):
        drawn.append((path, written({**schemas.limit(path), **value} if isinstance(value, dict) else value)))
    for path, body in draw(st.one_of([_of_path(schemas, path) for path in schemas.paths]), count // 4, seed):
        drawn.append((path, written({**schemas.limit(path), **json.loads(body)})))
    changed = itertools.cycle(valid_bodies())
    while len(drawn) < count:
        path, valid = next(changed)
        drawn.append((path, _changed_bytes(written(_changed(valid, schemas, source)), source)))
    source.shuffle(drawn)
    return drawn


def _of_path(schemas: Schemas, path: str) -> st.SearchStrategy[tuple[str, str]]:
    # As text, which can be a key: draw() leaves out what was there before.
    return schemas.values(schemas.paths[path]).map(lambda body: (path, json.dumps(body)))


def written(body: Any) -> bytes:
    """The body's text, with the fragments in the places of their marks."""
    return WRITTEN_MARK.sub(lambda mark: FRAGMENTS[int(mark[1])], json.dumps(body).encode())


def _changed(body: dict[str, Any], schemas: Schemas, source: random.Random) -> dict[str, Any]:
    """The body with one to three changes at any depth: another value, a further field, or a missing one."""
    body = json.loads(json.dumps(body))
    # Also those of other paths: /v1/responses takes fields of chats.
    known = [name for each in schemas.paths.values() for name in schemas.resolve(each)["properties"]]
    fields = [*known, *UNSUPPORTED, *WITHOUT_EFFECT, "unknown", "", "\0"]
    for _ in range(source.randint(1, 3)):
        holder = source.choice(list(_holders(body)))
        mark = MARK.format(source.randrange(len(FRAGMENTS)))
        if isinstance(holder, list):
            holder.insert(source.randint(0, len(holder)), mark)
        elif source.random() < 0.2 and holder:
            del holder[source.choice(list(holder))]
        else:
            holder[source.choice([*holder, *fields] if holder is body else [*holder, "unknown"])] = mark
    return body


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _holders(each)


def _changed_bytes(body: bytes, source: random.Random) -> bytes:
    """In one of three cases the body's bytes are changed, so that it may be no JSON."""
    at = source.randrange(len(body) + 1)
    changes = [
        body[:at],
        body[:at] + bytes([source.randrange(256)]) + body[at + 1 :],
        body + source.choice([b"}", b"\0", b" {}", b"\xff"]),
        b"\xef\xbb\xbf" + body,
        body.decode("latin-1").encode("utf-16"),
        body.replace(b"{", b'{"model": 1, "model": null, ', 1),
        source.randbytes(at % 100),
        b"[" * (at % 3000) + body,
    ]
    return source.choice(changes) if source.random() < 1 / 3 else body
