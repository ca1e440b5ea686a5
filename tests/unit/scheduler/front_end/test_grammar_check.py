"""The form that a request wants its output to have: checked in sizes, then compiled, away from the event loop."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tandem_scheduler.front_end.generation_params import GenerationParams, StructuredOutput
from tandem_scheduler.front_end.grammar_check import MAX_CHOICES, NUM_THREADS, GrammarChecker
from tandem_scheduler.front_end.text.encoder import TextEncoder
from tandem_scheduler.front_end.validation import GenerationRequest, check_request
from tandem_shared.errors import InvalidRequest
from tandem_shared.model_folder import tokenizer_digest
from tandem_shared.sampling_lists import MAX_GRAMMAR_BYTES, Grammar
from tandem_shared.structured_output import choice_grammar, json_schema_grammar, regex_grammar
from tests.support.builders import worker_info
from tests.support.tokenizers import EMBEDDED, embedded

EOS = (1017, 1015)
WORKER = worker_info(
    vocab_size=1024, max_model_len=512, eos_token_ids=EOS, tokenizer_digest=tokenizer_digest(EMBEDDED.parent)
)
ENCODER = TextEncoder(embedded())
GRAMMARS = GrammarChecker(EMBEDDED.parent, embedded())


async def check(worker: Any = WORKER, grammars: GrammarChecker | None = GRAMMARS, **fields: Any) -> GenerationRequest:
    """fields: of StructuredOutput and GenerationParams."""
    names = StructuredOutput.__slots__
    form = StructuredOutput(**{name: fields.pop(name) for name in names if name in fields})
    params = GenerationParams(prompt_token_ids=[1], structured_output=form, **fields)
    return await check_request(params, ENCODER, worker, "served", grammars)


async def violation(**fields: Any) -> tuple[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        await check(**fields)
    [found] = caught.value.violations
    return found.field, found.description


async def test_each_form_becomes_a_grammar() -> None:
    schema = '{"type": "integer"}'
    checked = await check(json_schema=schema, start_after_token_id=1023, ignore_eos=True)
    assert checked.first.lists.grammar == Grammar(json_schema_grammar(schema), 1023, True)
    assert checked.first.stop_token_ids == {*EOS}
    assert (await check(regex="a+")).first.lists.grammar == Grammar(regex_grammar("a+"))
    assert (await check(choice=["x", "y"])).first.lists.grammar == Grammar(choice_grammar(["x", "y"]))
    assert (await check(json_object=True)).first.lists.grammar is not None
    assert (await check(lark='start: "x"')).first.lists.grammar is not None


class LongTexts(Sequence[str]):
    """Texts whose number is too high, and which are not to be read."""

    def __len__(self) -> int:
        return MAX_CHOICES + 1

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a text was read")


@pytest.mark.parametrize(
    ("fields", "field", "description"),
    [
        ({}, "structured_output", "has none"),
        ({"json_object": True, "regex": "a"}, "structured_output", "has json_object, regex"),
        ({"json_schema": "{"}, "structured_output.json_schema", "has JSON that can't be read"),
        ({"json_schema": '{"type": "no"}'}, "structured_output.json_schema", "Invalid type: no"),
        ({"regex": "a("}, "structured_output.regex", "has a wrong regular expression: unclosed group"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "structured_output.regex", "must have 131072 characters at most"),
        ({"regex": "\n" * MAX_GRAMMAR_BYTES}, "structured_output.regex", "characters as a grammar"),
        ({"lark": "start: a"}, "structured_output.lark", 'unknown name: "a"'),
        ({"choice": []}, "structured_output.choice", "must have 1 to 1024 texts"),
        ({"choice": LongTexts()}, "structured_output.choice", "must have 1 to 1024 texts"),
        ({"choice": ["a", ""]}, "structured_output.choice", "has an empty text"),
        ({"regex": "a", "start_after_token_id": 1024}, "structured_output.start_after_token_id", "1024 is not in"),
    ],
)
async def test_what_is_wrong_is_told_with_its_field(fields: dict[str, Any], field: str, description: str) -> None:
    found_field, found = await violation(**fields)
    assert found_field == field and description in found and len(found) < 300


async def test_nothing_is_compiled_for_a_request_that_is_wrong_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRAMMARS, "_compile", None)
    with pytest.raises(InvalidRequest, match="num_choices"):
        await check(regex="a", num_choices=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer_digest": ""}, "no tokenizer.json"),
        ({"tokenizer_digest": "other"}, "another tokenizer.json"),
        ({"eos_token_ids": ()}, "no end-of-sequence token"),
    ],
)
async def test_a_worker_that_cannot_follow_a_grammar(changes: dict[str, Any], reason: str) -> None:
    field, description = await violation(worker=replace(WORKER, **changes), regex="a")
    assert field == "structured_output" and reason in description


async def test_without_a_checker_nothing_is_promised() -> None:
    assert await violation(grammars=None, regex="a") == ("structured_output", "is not possible here")


async def test_a_slow_grammar_holds_up_neither_the_event_loop_nor_more_than_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = GrammarChecker(EMBEDDED.parent, embedded())
    compile_now, may_go_on, started = checker._compile, threading.Event(), []

    def slow(kind: str, value: str) -> str:
        started.append(value)
        assert value.startswith("quick") or may_go_on.wait(30)
        return compile_now(kind, value)

    monkeypatch.setattr(checker, "_compile", slow)
    calls = [asyncio.create_task(check(grammars=checker, regex=f"slow{n}")) for n in range(NUM_THREADS + 1)]
    async with asyncio.timeout(10):
        while len(started) < NUM_THREADS:
            await asyncio.sleep(0.001)
    calls[-1].cancel()
    await asyncio.sleep(0.02)
    assert calls[-1].cancelled() and len(started) == NUM_THREADS
    may_go_on.set()
    await asyncio.gather(*calls[:-1])
    assert len(started) == NUM_THREADS


async def test_a_schema_of_the_largest_size_is_answered_in_time() -> None:
    schema = json.dumps({"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(4400)}})
    assert len(schema) > 0.85 * MAX_GRAMMAR_BYTES
    async with asyncio.timeout(5):
        field, description = await violation(json_schema=schema)
    assert field == "structured_output.json_schema" and "too big" in description
