"""The forms in which LLM takes prompts and their params, made into one list."""

import dataclasses
import numbers
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tandem.calls import Prompt
from tandem.chat import Chat
from tandem.sampling_params import SamplingParams
from tandem_shared.errors import FieldViolation, InvalidRequest

PromptForm: TypeAlias = Prompt | Mapping[str, Any]
"""A prompt, or a dict with it as "prompt", a text, or as "prompt_token_ids", and perhaps a "cache_salt"."""

ParamsForm: TypeAlias = SamplingParams | Sequence[SamplingParams] | None

KEYS = ("prompt", "prompt_token_ids", "cache_salt")
FORMS = 'a text, token ids, a Chat, or a dict with "prompt" or "prompt_token_ids"'


@dataclass(frozen=True)
class Item:
    """One prompt of several, and what is asked for it."""

    prompt: Prompt
    params: SamplingParams
    cache_salt: str | None = None
    priority: int | None = None


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt, not a list of prompts."""
    if isinstance(prompts, str | Mapping | Chat):
        return True
    if hasattr(prompts, "ndim"):
        return bool(prompts.ndim == 1)
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and _is_id(prompts[0])


def read_items(
    prompts: Iterable[PromptForm],
    sampling_params: ParamsForm,
    seeds: random.Random | None = None,
    priority: Sequence[int] | None = None,
) -> list[Item]:
    """The prompts with their params: one for all, or a list of as many. seeds makes the seeds of params without one.
    priority: that of each prompt.

    Raises InvalidRequest, which names the prompt by its index, for a value that is no prompt.
    """
    every = list(prompts)
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        params = [sampling_params or SamplingParams()] * len(every)
    else:
        params = list(sampling_params)
        if len(params) != len(every):
            raise _refusal("sampling_params", f"are {len(params)} for {len(every)} prompts; give one, or one for each")
        for index, each in enumerate(params):
            if not isinstance(each, SamplingParams):
                raise _refusal(f"sampling_params[{index}]", f"must be SamplingParams, is {type(each).__name__}")
    if seeds is not None:
        params = [
            each if each.seed is not None else dataclasses.replace(each, seed=seeds.getrandbits(64)) for each in params
        ]
    items = [
        _read(prompt, of_prompt, index) for index, (prompt, of_prompt) in enumerate(zip(every, params, strict=True))
    ]
    if priority is None:
        return items
    if len(priority) != len(items):
        raise _refusal("priority", f"has {len(priority)} for {len(items)} prompts")
    return [dataclasses.replace(item, priority=each) for item, each in zip(items, priority, strict=True)]


def _read(prompt: Any, params: SamplingParams, index: int) -> Item:
    field = f"prompts[{index}]"
    cache_salt = None
    if isinstance(prompt, Mapping):
        if unknown := sorted(set(map(str, prompt)) - set(KEYS)):
            raise _refusal(field, f"has unknown keys: {', '.join(unknown)}; known are {', '.join(KEYS)}")
        given = [prompt[key] for key in KEYS[:2] if prompt.get(key) is not None]
        if len(given) != 1:
            raise _refusal(field, 'must have exactly one of "prompt" and "prompt_token_ids"')
        cache_salt = prompt.get("cache_salt")
        [prompt] = given
    if isinstance(prompt, str | Chat):
        return Item(prompt, params, cache_salt)
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(ids, Sequence) or isinstance(ids, bytes) or not all(map(_is_id, ids)):
        raise _refusal(field, f"must be {FORMS}, is {prompt!r:.100}")
    return Item([int(each) for each in ids], params, cache_salt)


def _is_id(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _refusal(field: str, description: str) -> InvalidRequest:
    return InvalidRequest(FieldViolation(field, description))
