"""The fixed list of hostile model folders, and what the error must name for each."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.folders.changes import (
    CONFIG,
    GENERATION,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Change,
    nested,
    no_real_file,
    raw_header,
    rewrite,
    rewrite_header,
    rewrite_json,
)

OUTSIDE = "outside.safetensors"
"""A file beside the folders with the true weights, so that a loader that follows a path to it serves the model."""


@dataclass(frozen=True)
class Case:
    """A folder that must be refused, by an error that contains all of `named`. change: makes it from a valid folder."""

    title: str
    change: Change
    named: tuple[str, ...]


def weight_cases() -> Iterator[Case]:
    tensor, other = "model.norm.weight", "lm_head.weight"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    twice = header[:-1] + b"," + header[1:]
    raw: dict[str, Change] = {
        "no bytes": rewrite(WEIGHTS, b""),
        "three bytes": rewrite(WEIGHTS, b"abc"),
        "header of 2**63 bytes": raw_header(header, 2**63),
        "header of 2**64 - 1 bytes": raw_header(header, 2**64 - 1),
        "header of 1 TB": raw_header(header, 2**40),
        "header of no bytes": raw_header(header, 0),
        "header that is not JSON": raw_header(b"{" * 50),
        "header that is a list": raw_header(b"[1, 2]"),
        "header that is not UTF-8": raw_header(b'{"\xff\xfe": 1}'),
        "header of 100 levels": raw_header(nested(100)),
        "header of 100,000 levels": raw_header(b"[" * 100_000),
        "names twice": raw_header(twice),
        **no_real_file(WEIGHTS),
    }
    for title, change in raw.items():
        yield Case(f"weights: {title}", change, (WEIGHTS,))
    for share in (0.1, 0.5, 0.999):

        def cut(folder: Path, share: float = share) -> None:
            data = (folder / WEIGHTS).read_bytes()
            rewrite(WEIGHTS, data[: int(share * len(data))])(folder)

        yield Case(f"weights: cut at {share}", cut, (WEIGHTS,))
    entries: dict[str, Any] = {
        "offsets outside the file": {"data_offsets": [0, 2**50]},
        "offsets past 2**64": {"data_offsets": [2**64, 2**65]},
        "negative offsets": {"data_offsets": [-4, 0]},
        "reversed offsets": {"data_offsets": [128, 0]},
        "overlapping offsets": {"data_offsets": [0, 128]},
        "three offsets": {"data_offsets": [0, 4, 8]},
        "an unknown type": {"dtype": "X"},
        "a type that is a number": {"dtype": 5},
        "a negative size": {"shape": [-32]},
        "a size that overflows": {"shape": [2**40, 2**40]},
        "no sizes": {"shape": None},
    }
    for title, entry in entries.items():
        yield Case(f"weights: {title}", rewrite_header(lambda h, e=entry: h[tensor].update(e)), (WEIGHTS,))  # type: ignore[misc]
    yield Case("weights: whole numbers", rewrite_header(lambda h: h[tensor].update(dtype="I32")), (WEIGHTS, tensor))
    yield Case("weights: another shape", rewrite_header(lambda h: h[tensor].update(shape=[4, 8])), (WEIGHTS, tensor))
    yield Case("weights: a name too many", rewrite_header(lambda h: h.update(x=h.pop(other))), (WEIGHTS, "x"))
    yield Case("weights: metadata of lists", rewrite_header(lambda h: h.update(__metadata__={"a": [1]})), (WEIGHTS,))


def config_cases() -> Iterator[Case]:
    sizes = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    values = ("x", [], {}, -1, 0, True, math.nan, math.inf, 2**70, 10**400, -(10**400), [[1]], {"a": 1})
    for key in sizes:
        for value in values:
            edit = rewrite_json(CONFIG, lambda c, k=key, v=value: c.update({k: v}))  # type: ignore[misc]
            yield Case(f"config: {key} {str(value)[:9]}", edit, (CONFIG, key))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        yield Case(f"config: no {key}", rewrite_json(CONFIG, lambda c, k=key: c.pop(k)), (CONFIG, key))  # type: ignore[misc]
    for key, wrong in (
        ("architectures", 5), ("architectures", ["Gpt"]), ("tie_word_embeddings", "yes"), ("rope_parameters", 5),
        ("rope_parameters", {"rope_theta": "x"}), ("layer_types", 5), ("layer_types", ["sliding"]),
        ("quantization_config", [[]]), ("hidden_act", {}), ("rope_scaling", {"rope_type": [[]], "rope_theta": 1e4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": math.nan, "rope_theta": 1e4}),
    ):  # fmt: skip
        edit = rewrite_json(CONFIG, lambda c, k=key, v=wrong: c.update({k: v}))  # type: ignore[misc]
        yield Case(f"config: {key} {str(wrong)[:9]}", edit, (CONFIG,))
    # Valid sizes, but of a model that does not fit the memory or differs from the checkpoint.
    for key, size in (("vocab_size", 2**24), ("hidden_size", 2**20), ("num_hidden_layers", 1000), ("head_dim", 2**20)):
        edit = rewrite_json(CONFIG, lambda c, k=key, v=size: c.update({k: v}))  # type: ignore[misc]
        yield Case(f"config: {key} {size}", edit, ())


def json_cases(name: str) -> Iterator[Case]:
    """Files that are wrong whatever JSON the file should hold."""
    changes: dict[str, Change] = {
        "no bytes": rewrite(name, b""),
        "a list": rewrite(name, b"[1, 2]"),
        "null": rewrite(name, b"null"),
        "not UTF-8": rewrite(name, b'{"a": "\xff\xfe\xfa"}'),
        "100 levels, not closed": rewrite(name, nested(100)[:-1]),
        "100,000 levels": rewrite(name, nested(100_000)),
        "100,000 lists": rewrite(name, b'{"a":' + nested(100_000, "[", "]") + b"}"),
        "a number of 10,000 digits": rewrite(name, b'{"a": ' + b"9" * 10_000 + b"}"),
        "100 MB of lists": rewrite(name, b'{"a": [', repeated=b"[],", count=35_000_000, end=b"[]]}"),
        "100 MB of objects, not closed": rewrite(name, b'{"a": [', repeated=b'{"a":1},', count=12_500_000),
        **no_real_file(name),
    }
    for title, change in changes.items():
        yield Case(f"{name}: {title}", change, (name,))


def index_cases() -> Iterator[Case]:
    def shard(weight_map: Any) -> Change:
        def change(folder: Path) -> None:
            (folder / WEIGHTS).unlink()
            rewrite(INDEX, json.dumps({"weight_map": weight_map}).encode())(folder)

        return change

    names = (
        f"../{OUTSIDE}", f"./../{OUTSIDE}", f"x/../../{OUTSIDE}", "ABSOLUTE", "/dev/zero", "/etc/passwd", "..", ".", "",
        "~/x", "\0", "a" * 5000, 5, None, [OUTSIDE], {"a": 1}, "missing.safetensors", "file:///etc/passwd",
    )  # fmt: skip
    for name in names:

        def change(folder: Path, name: Any = name) -> None:
            absolute = str(folder.parent / OUTSIDE)
            shard({"lm_head.weight": absolute if name == "ABSOLUTE" else name})(folder)

        named = (INDEX,) if name not in (".", "\0", "a" * 5000, "missing.safetensors") else ()
        yield Case(f"index: {str(name)[:30]!r}", change, named)
    for weight_map in ([], {}, 5, "x", None):
        yield Case(f"index: map {weight_map}", shard(weight_map), (INDEX, "weight_map"))


def text_cases() -> Iterator[Case]:
    def tokenizer(**values: Any) -> Change:
        return rewrite_json(TOKENIZER, lambda t: t.update(values))

    def model(**values: Any) -> Change:
        return rewrite_json(TOKENIZER, lambda t: t["model"].update(values))

    deep: Any = {"type": "NFC"}
    for _ in range(100):
        deep = {"type": "Sequence", "normalizers": [deep]}
    changes: dict[str, Change] = {
        "100 levels of normalizers": tokenizer(normalizer=deep),
        "a regex that is none": tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}),
        "a charsmap that is none": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "an unknown normalizer": tokenizer(normalizer={"type": "X"}),
        "a vocabulary that is a number": model(vocab=5),
        "negative ids": model(vocab={"a": -1}, merges=[]),
        "ids past 2**32": model(vocab={"a": 2**32}, merges=[]),
        "merges of nothing": model(merges=["qq qq"]),
        "merges that are numbers": model(merges=[5]),
        "an unknown model": model(type="X"),
        "no model": rewrite_json(TOKENIZER, lambda t: t.pop("model")),
        "added tokens that are numbers": tokenizer(added_tokens=[5]),
    }
    for title, change in changes.items():
        yield Case(f"tokenizer: {title}", change, (TOKENIZER,))
    for key, value in (
        ("eos_token_id", "x"), ("eos_token_id", -1), ("eos_token_id", [2**70]), ("eos_token_id", {"a": 1}),
        ("temperature", "hot"), ("temperature", math.nan), ("temperature", -1), ("top_k", 1.5), ("top_k", 2**40),
        ("top_p", math.inf), ("top_p", []), ("min_p", {}), ("do_sample", "no"),
    ):  # fmt: skip
        edit = rewrite_json(GENERATION, lambda c, k=key, v=value: c.update({"do_sample": True, k: v}))  # type: ignore[misc]
        yield Case(f"generation: {key} {value}", edit, (GENERATION, key))
    for value in (5, [], {}, {"content": 5}, True):
        edit = rewrite_json(TOKENIZER_CONFIG, lambda c, v=value: c.update(eos_token=v))  # type: ignore[misc]
        yield Case(f"tokenizer_config: eos_token {value}", edit, (TOKENIZER_CONFIG, "eos_token"))


def template_cases() -> Iterator[Case]:
    """Chat templates that can't be read. What is wrong in a template is told to whoever sends a chat."""
    for value in (5, {}, [5], [{"name": "default"}], [{"name": 5, "template": "x"}], "x" * (2**20 + 1)):
        edit = rewrite_json(TOKENIZER_CONFIG, lambda c, v=value: c.update(chat_template=v))  # type: ignore[misc]
        yield Case(f"tokenizer_config: chat_template {str(value)[:30]}", edit, (TOKENIZER_CONFIG, "chat_template"))
    files = {"not UTF-8": rewrite(TEMPLATE, b"\xff\xfe"), "2 MB": rewrite(TEMPLATE, b"x" * 2**21)}
    for title, change in {**files, **no_real_file(TEMPLATE)}.items():
        yield Case(f"template: {title}", change, (TEMPLATE,))


def fixed_cases() -> list[Case]:
    return [
        *weight_cases(),
        *config_cases(),
        *index_cases(),
        *text_cases(),
        *template_cases(),
        *(case for name in (CONFIG, TOKENIZER, GENERATION, TOKENIZER_CONFIG, INDEX) for case in json_cases(name)),
    ]
