"""Hostile model folders, given to what both services do when they start: each is served, or refused by an error that
names the file. Nothing hangs, crashes, ends in a traceback or is read from outside the folder.
"""

import contextlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from tandem_shared.model_folder import resolve_model
from tests.chaos.harness.definitions import Form, Found, Part, Row
from tests.chaos.support.load import MAX_FAULTS
from tests.support.model_factory import save_random_model

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
OUTSIDE = "outside.safetensors"
"""Beside the folders: the true weights, so that whoever reads them serves the model."""
TIMEOUT_S = 20.0
"""For one folder; they take milliseconds. A real command takes seconds, to import."""
MAX_ERROR_CHARACTERS = 2000
MEMORY_BYTES = 24 << 30
"""Of address space, for a real command."""
SHARDS = ("shard-1.safetensors", "shard-2.safetensors")

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A folder that must be refused, by an error that names all of `named`. change: of a valid folder."""

    title: str
    change: Change
    named: tuple[str, ...]


def rewrite(name: str, contents: bytes, *, repeated: bytes = b"", count: int = 0, end: bytes = b"") -> Change:
    """The file is contents, then `repeated` so many times, then the end."""

    def change(folder: Path) -> None:
        # The valid folder's file is linked, so it must not be written to.
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(contents + repeated * count + end)

    return change


def rewrite_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        rewrite(name, json.dumps(values).encode())(folder)

    return change


def grow(name: str, num_bytes: int) -> Change:
    """A file with a hole, that takes no room."""

    def change(folder: Path) -> None:
        rewrite(name, b'{"a": "')(folder)
        os.truncate(folder / name, num_bytes)

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def no_real_file(name: str) -> dict[str, Change]:
    """What stands in a file's place, by title: too large to be one, or none at all."""
    return {
        "1 TB": grow(name, 1 << 40),
        "a device": link(name, "/dev/zero"),
        "a link to itself": link(name, name),
        "a link to nothing": link(name, "nowhere"),
    }


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite_header(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        header, data = split((folder / WEIGHTS).read_bytes())
        text = json.dumps(edit(header) or header).encode()
        rewrite(WEIGHTS, struct.pack("<Q", len(text)) + text + data)(folder)

    return change


def raw_header(text: bytes, length: int | None = None) -> Change:
    def change(folder: Path) -> None:
        _, data = split((folder / WEIGHTS).read_bytes())
        rewrite(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text + data)(folder)

    return change


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


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
        "header that is no JSON": raw_header(b"{" * 50),
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
    # Sizes that are possible, of a model that does not fit the memory, or is not the one in the checkpoint.
    for key, size in (("vocab_size", 2**24), ("hidden_size", 2**20), ("num_hidden_layers", 1000), ("head_dim", 2**20)):
        edit = rewrite_json(CONFIG, lambda c, k=key, v=size: c.update({k: v}))  # type: ignore[misc]
        yield Case(f"config: {key} {size}", edit, ())


def json_cases(name: str) -> Iterator[Case]:
    """What is wrong in any JSON file."""
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


def fixed_cases() -> list[Case]:
    return [
        *weight_cases(),
        *config_cases(),
        *index_cases(),
        *text_cases(),
        *(case for name in (CONFIG, TOKENIZER, GENERATION, TOKENIZER_CONFIG, INDEX) for case in json_cases(name)),
    ]


EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 255, 2**31, 2**32 - 1, 2**53, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e308, math.inf,
    math.nan, "", "a", "\0", "\ud800", "../x", "x" * 10_000, [], {}, [[]], [None], {"a": {"a": []}},
)  # fmt: skip


def random_change(folder: Path, rng: random.Random) -> str:
    """Changes one file of a valid folder. Returns which."""
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG, CONFIG, TOKENIZER, TOKENIZER, GENERATION, TOKENIZER_CONFIG])
    data = bytearray((folder / name).read_bytes())
    if name != WEIGHTS and rng.random() < 0.6:
        values = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            change_value(values, rng)
        rewrite(name, json.dumps(values).encode())(folder)
        return name
    # Of the weights the header alone has anything to read.
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
    """Replaces, removes or adds a value somewhere inside."""
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


class Reader:
    """The process of reader.py, started again where a folder ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.folders.reader"]
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def read(self, folder: Path) -> dict[str, Any] | str:
        """What came of it, or how the process failed."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        has_answer = bool(select.select([process.stdout], [], [], TIMEOUT_S)[0])
        answer = process.stdout.readline() if has_answer else ""
        if answer:
            result: dict[str, Any] = json.loads(answer)
            return result
        self.close()
        problem = f"the process ended with status {process.returncode}" if has_answer else f"hangs for {TIMEOUT_S:g} s"
        self._start()
        return problem

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def valid_folder() -> Iterator[Path]:
    """One that both services take, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="tandem-folders-") as root:
        folder = save_random_model(Path(root, "valid"), vocab_size=1024)
        embedded = resolve_model("embedded", [])
        for name in (TOKENIZER, TOKENIZER_CONFIG, GENERATION):
            shutil.copy(embedded / name, folder / name)
        shutil.copy(folder / WEIGHTS, Path(root, OUTSIDE))
        yield folder


@contextlib.contextmanager
def changed(valid: Path, name: str) -> Iterator[Path]:
    folder = valid.parent / name
    folder.mkdir()
    for path in valid.iterdir():
        os.link(path, folder / path.name)
    yield folder
    shutil.rmtree(folder)


def faults_in(answer: dict[str, Any] | str, folder: Path, named: Sequence[str] | None) -> list[str]:
    """named: what an error of either service must name; None where the folder may be served."""
    if isinstance(answer, str):
        return [answer]
    outcomes = [answer["worker"], answer["scheduler"]]
    errors = [text for kind, text in outcomes if kind not in ("served", "traceback")]
    faults = [f"traceback: {text}" for kind, text in outcomes if kind == "traceback"]
    faults += [f"names no file of the folder: {text}" for text in errors if str(folder) not in text]
    faults += [f"an error of {len(text)} characters" for text in errors if len(text) > MAX_ERROR_CHARACTERS]
    faults += [f"opened {path}" for path in answer["opened"]]
    if named is not None and not faults:
        if not errors:
            faults.append("was served")
        elif not any(all(word in text for word in named) for text in errors):
            faults.append(f"does not name {' and '.join(named)}: {errors[0]}")
    return faults


def run(*, fixed: bool, mutations: int = 0, commands: int = 0, seed: int = 0) -> Found:
    """fixed: tries the fixed list. mutations: random ones. commands: how many of the list the real commands get."""
    faults: list[str] = []
    num_refused = 0
    cases, rng = fixed_cases(), random.Random(seed)
    with valid_folder() as valid, contextlib.closing(Reader()) as reader:
        answer = reader.read(valid)
        assert not isinstance(answer, str) and answer["worker"] == answer["scheduler"] == ["served", ""], answer
        for number, case in enumerate(cases if fixed else ()):
            with changed(valid, f"fixed-{number}") as folder:
                case.change(folder)
                faults += [f"{case.title}: {fault}" for fault in faults_in(reader.read(folder), folder, case.named)]
        for number in range(mutations):
            with changed(valid, f"random-{number}") as folder:
                name = random_change(folder, rng)
                answer = reader.read(folder)
                num_refused += (
                    isinstance(answer, dict) and [answer["worker"][0], answer["scheduler"][0]] != ["served"] * 2
                )
                faults += [f"random {number} of {name}: {fault}" for fault in faults_in(answer, folder, None)]
        for case in rng.sample(cases, commands):
            with changed(valid, "command") as folder:
                case.change(folder)
                faults += [f"{case.title}: {fault}" for fault in command_faults(folder, case.named)]
    return {
        "fixed": len(cases) if fixed else 0,
        "mutations": mutations,
        "refused_mutations": num_refused,
        "commands": commands,
        "num_faults": len(faults),
        "faults": faults[:MAX_FAULTS],
    }


def command_faults(folder: Path, named: Sequence[str]) -> list[str]:
    """Starts both services' real commands. One of them, at least, must refuse the folder."""
    flags: dict[str, list[str]] = {
        "tandem_worker": ["--device", "cpu", "--num-threads", "1", "--num-blocks", "8"],
        "tandem_scheduler": ["--worker-address", "127.0.0.1:1", "--api-server-count", "0"],
    }
    faults, texts = [], []
    for module, own in flags.items():
        command = [sys.executable, "-m", module, "--model", str(folder), "--port", "0", *own]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_limit
        )
        try:
            text, _ = process.communicate(timeout=TIMEOUT_S if not texts else 5.0)
        except subprocess.TimeoutExpired:
            # It serves: nothing that it reads is wrong.
            process.terminate()
            text, _ = process.communicate()
            if "listening on" not in text:
                faults.append(f"{module} neither ends nor listens")
            continue
        if process.returncode != 2:
            faults.append(f"{module} ended with status {process.returncode}: {text[-300:]}")
        if "Traceback" in text:
            faults.append(f"{module} has a traceback: {text[-300:]}")
        texts.append(text)
    if not any(all(word in text for word in named) for text in texts):
        faults.append(f"no command names {' and '.join(named)}: {re.sub(chr(10), ' ', ' '.join(texts))[-300:]}")
    return faults


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def rows(pieces: Sequence[Found]) -> list[Row]:
    sums = {name: sum(piece[name] for piece in pieces) for name in ("fixed", "mutations", "refused_mutations")}
    commands = sum(piece["commands"] for piece in pieces)
    num_faults = sum(piece["num_faults"] for piece in pieces)
    examples = [fault for piece in pieces for fault in piece["faults"]]
    return [
        Row(
            "a hostile model folder is refused by an error that names its file, or served: no traceback, no hang, no "
            "crash, and nothing outside the folder is read",
            f"{sums['fixed']} hostile folders and {sums['mutations']} random changes of a valid one, {commands} of "
            "them with the real commands",
            f"{num_faults} faults{f', such as: {examples[0]}' if examples else ''}; {sums['refused_mutations']} of the "
            "random ones refused",
            not num_faults and sums["fixed"] + sums["mutations"] > 0,
        )
    ]


PART = Part(
    "folders",
    run,
    rows,
    {
        Form.SHORT: [{"fixed": True}],
        Form.LONG: [{"fixed": True, "commands": 2, "mutations": 300, "seed": 1}],
        Form.FULL: [
            {"fixed": True, "commands": 20, "seed": 2},
            *({"fixed": False, "mutations": 500, "seed": seed} for seed in (3, 4, 5, 6)),
        ],
    },
)
