"""Random changes of one file of a valid model folder."""

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.chaos.folders.changes import CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, rewrite, split

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 255, 2**31, 2**32 - 1, 2**53, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e308, math.inf,
    math.nan, "", "a", "\0", "\ud800", "../x", "x" * 10_000, [], {}, [[]], [None], {"a": {"a": []}},
)  # fmt: skip


def random_change(folder: Path, rng: random.Random) -> str:
    """Changes one file of a valid folder. Returns its name."""
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG, CONFIG, TOKENIZER, TOKENIZER, GENERATION, TOKENIZER_CONFIG])
    data = bytearray((folder / name).read_bytes())
    if name != WEIGHTS and rng.random() < 0.6:
        values = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            change_value(values, rng)
        rewrite(name, json.dumps(values).encode())(folder)
        return name
    # Only the header of the weights has content to check.
    end = len(data) if name != WEIGHTS else 8 + len(json.dumps(split(bytes(data))[0]))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(end), rng.choice([1, 2, 8, 50])
        match rng.choice(["flip", "write", "insert", "remove", "repeat", "cut"]):
            case "flip":
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case "write":
                data[at : at + length] = rng.choice([rng.randbytes(length), b"[" * length, b"9" * length, b"-", b'"'])
            case "insert":
                data[at:at] = rng.choice([rng.randbytes(length), b"[" * length, b'{"a":' * length, b"9" * length])
            case "remove":
                del data[at : at + length]
            case "repeat":
                data[at:at] = data[at : at + length] * rng.choice([1, 3])
            case "cut" if rng.random() < 0.2:
                del data[at:]
        if not data:
            break
    rewrite(name, bytes(data))(folder)
    return name


def change_value(values: Any, rng: random.Random) -> None:
    """Replaces, removes or adds a value at a random depth."""
    while True:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(values[key], dict | list) and values[key] and rng.random() < 0.7:
            values = values[key]
            continue
        if rng.random() < 0.2:
            del values[key]
        elif isinstance(values, dict) and rng.random() < 0.2:
            values[rng.choice(["a", "", "type", "content"])] = rng.choice(EXTREMES)
        else:
            values[key] = rng.choice(EXTREMES)
        return
