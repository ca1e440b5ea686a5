"""The workloads: prompts as token ids, and output lengths, which are exact since each request ignores EOS."""

from random import Random
from typing import Any

MAX_TOKEN_ID = 10_000
"""Well below the special tokens at the end of a real vocabulary."""

Workload = tuple[list[list[int]], list[int]]
"""Prompts, and the number of output tokens of each."""


def nano256(num_seqs: int = 256, vocab_size: int = MAX_TOKEN_ID + 1) -> Workload:
    """nano-vllm's bench.py: 100-1024 tokens in, 100-1024 out; 133,966 output tokens for 256.

    A smaller vocabulary folds the ids, and changes no length.
    """
    rng = Random(0)
    prompts = [_prompt(rng, rng.randint(100, 1024), vocab_size) for _ in range(num_seqs)]
    outputs = [rng.randint(100, 1024) for _ in range(num_seqs)]
    return prompts, outputs


def fixed(
    num_seqs: int, prompt_len: int, output_len: int, seed: int = 1, vocab_size: int = MAX_TOKEN_ID + 1
) -> Workload:
    """num_seqs distinct prompts of one length, all with one output length."""
    rng = Random(seed)
    return [_prompt(rng, prompt_len, vocab_size) for _ in range(num_seqs)], [output_len] * num_seqs


def shortened(workload: Workload, scale: int) -> Workload:
    """The workload with fewer and shorter sequences, each number divided by `scale`, for slow machines."""
    prompts, outputs = workload
    count = reduced(len(prompts), scale)
    return [prompt[: reduced(len(prompt), scale)] for prompt in prompts[:count]], [
        reduced(length, scale) for length in outputs[:count]
    ]


def reduced(number: int, scale: int) -> int:
    return max(1, number // scale)


def _prompt(rng: Random, length: int, vocab_size: int) -> list[int]:
    return [rng.randint(0, MAX_TOKEN_ID) % vocab_size for _ in range(length)]


def array_schema(name_limits: dict[str, int], tag_limits: dict[str, int]) -> dict[str, Any]:
    """A JSON schema of an array of objects. The limits are further keywords of two of its strings.

    With 100,000 items to come an output never ends by itself.
    """
    properties = {
        "name": {"type": "string", **name_limits},
        "count": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["tragedy", "comedy", "history"]},
        "tags": {"type": "array", "items": {"type": "string", **tag_limits}, "maxItems": 4},
    }
    item = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "array", "minItems": 100_000, "items": item}


SCHEMAS = {"array": array_schema({}, {}), "short_strings": array_schema({"maxLength": 16}, {"maxLength": 8})}
"""Masks within strings of a limited length are costly, as each number of characters left is a state of its own."""
