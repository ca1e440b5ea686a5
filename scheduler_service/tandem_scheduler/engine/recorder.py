"""Writes down the calls to a scheduler that its plans depend on, with their answers, and replays such a file against a
fresh scheduler.

The core is deterministic, so a replay gives identical plans; the first answer that differs is a change of behaviour.
`python -m tandem_scheduler.engine.recorder FILE` prints the verdict on a file. Knows the core's verbs and plain data;
nothing of the wire or the clock.

The file is JSON lines: a header with the format's version, the config and the worker, then one call a line.
"""

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import xxhash

from tandem_scheduler.core.scheduler import Scheduler
from tandem_scheduler.core.types import Counters, FinishedSequence, SchedulerConfig, SequenceRequest, StepOutputs
from tandem_shared.errors import TandemError
from tandem_shared.sampling_fields import RowSampling
from tandem_shared.sampling_lists import Grammar, SamplingLists
from tandem_shared.step_plan import NewRow, PromptLogprobs, RowFault, RowLogprobs, StepPlan, StepResult, WorkerInfo

FORMAT = "tandem-schedule"
VERSION = 6
_BUFFER_BYTES = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


class RecordingError(TandemError):
    """The file is not a recording, or it is broken."""


class RecordingScheduler:
    """A scheduler whose calls are written to a file. The file is buffered: close() writes the tail.

    Each call of expire() is written, also those that end nothing. They hold the time just before each plan, by which
    tests/chaos/admission sees that no sequence starts after its deadline. And a replay needs them: the order in which
    sequences of one deadline end depends on the calls before.
    """

    def __init__(self, config: SchedulerConfig, worker: WorkerInfo, path: Path) -> None:
        self._scheduler = scheduler = Scheduler(config, worker)
        self._file = open(path, "w", buffering=_BUFFER_BYTES, encoding="utf-8", opener=_open_private)  # noqa: SIM115
        self._write({"format": FORMAT, "version": VERSION, "config": asdict(config), "worker": asdict(worker)})
        self.add = self._recorded(scheduler.add)
        self.abort = self._recorded(scheduler.abort)
        self.stop = self._recorded(scheduler.stop)
        self.expire = self._recorded(scheduler.expire)
        self.schedule = self._recorded(scheduler.schedule)
        self.update = self._recorded(scheduler.update)
        self.lose_worker = self._recorded(scheduler.lose_worker)
        self.attach_worker = self._recorded(scheduler.attach_worker)
        self.reset_prefix_cache = self._recorded(scheduler.reset_prefix_cache)
        # These calls change no answer of the calls above, so they are not written.
        self.discount = scheduler.discount
        self.load = scheduler.load
        self.check_integrity = scheduler.check_integrity

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    @property
    def num_decoding_rows(self) -> int:
        return self._scheduler.num_decoding_rows

    @property
    def num_unfinished(self) -> int:
        return self._scheduler.num_unfinished

    def close(self) -> None:
        self._file.close()

    def _recorded(self, method: Callable[P, T]) -> Callable[P, T]:
        """The method, with each call and its answer, or the name of its error, written to the file."""
        name = method.__name__

        def call(*arguments: P.args, **keywords: P.kwargs) -> T:
            assert not keywords, f"{name} is called with {[*keywords]} by name, which a recording does not hold"
            line = {"call": name, "arguments": [_to_json(argument) for argument in arguments]}
            try:
                answer = method(*arguments, **keywords)
            except (TandemError, ValueError) as error:
                self._write(line | {"error": type(error).__name__})
                raise
            self._write(line | {"answer": _to_json(answer)})
            return answer

        return call

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _open_private(path: str, flags: int) -> int:
    """Opens a file that only its owner may read, for it holds prompts; a file that was there becomes one too."""
    descriptor = os.open(path, flags, 0o600)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, 0o600)
    return descriptor


@dataclass(frozen=True, slots=True)
class Replay:
    """The verdict on a file. difference is None where every answer was the same."""

    num_calls: int
    num_plans: int
    difference: str | None
    is_truncated: bool
    """The last line is incomplete, as after a crash, and was left out."""


def replay(path: Path) -> Replay:
    """Drives a fresh scheduler with a file's calls, up to the first answer that differs. Raises RecordingError."""
    lines, is_truncated = _read(path)
    header = lines[0]
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise RecordingError(f"{path}: line 1: is not the header of a {FORMAT} recording of version {VERSION}")
    num_plans = 0
    try:
        scheduler = Scheduler(SchedulerConfig(**header["config"]), _worker_from_json(header["worker"]))
        for number, line in enumerate(lines[1:], start=2):
            got = _call(scheduler, line["call"], line["arguments"])
            wanted = {key: line[key] for key in ("answer", "error") if key in line}
            if got != wanted:
                difference = f"line {number}: {line['call']} gave {got}, the recording has {wanted}"
                return Replay(number - 2, num_plans, difference, is_truncated)
            num_plans += line["call"] == "schedule" and got["answer"] is not None
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordingError(f"{path}: a line is not as version {VERSION} has it: {error!r}") from error
    return Replay(len(lines) - 1, num_plans, None, is_truncated)


def _read(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """All complete lines, and whether an incomplete one follows."""
    text = path.read_text(encoding="utf-8")
    *whole, rest = text.split("\n")
    if not whole:
        raise RecordingError(f"{path}: holds no whole line")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordingError(f"{path}: line {number}: is not JSON: {error}") from error
    return lines, bool(rest)


def _call(scheduler: Scheduler, name: str, arguments: list[Any]) -> dict[str, Any]:
    if name not in _ARGUMENTS:
        raise RecordingError(f"{name!r} is not a call to a scheduler")
    decoders = _ARGUMENTS[name] * len(arguments) if name == "add" else _ARGUMENTS[name]
    if len(arguments) > len(decoders):
        raise RecordingError(f"{name} takes {len(decoders)} arguments at most, not {len(arguments)}")
    # A call may have left out its last argument, which has a default.
    decoded = [decode(argument) for decode, argument in zip(decoders, arguments, strict=False)]
    try:
        answer = getattr(scheduler, name)(*decoded)
    except (TandemError, ValueError) as error:
        return {"error": type(error).__name__}
    return {"answer": _to_json(answer)}


def _to_json(value: Any) -> Any:
    """Arguments in full, and of answers as much as shows a difference: hashes of a new row's token ids and lists, and
    of a step's outputs their numbers and the ends.
    """
    match value:
        case SequenceRequest():
            return {
                "sequence_id": value.sequence_id,
                "prompt_token_ids": value.prompt_token_ids.tolist(),
                "max_tokens": value.max_tokens,
                "sampling": asdict(value.sampling),
                "lists": asdict(value.lists) if value.lists else {},
                "stop_token_ids": sorted(value.stop_token_ids),
                "priority": value.priority,
                "cache_salt": value.cache_salt,
                "deadline": value.deadline,
            }
        case StepResult():
            return {
                "step_id": value.step_id,
                "num_token_ids": value.num_token_ids,
                "token_ids": value.token_ids,
                "faults": [asdict(fault) for fault in value.faults],
                "logprobs": [_round_trip(asdict(report)) for report in value.logprobs],
                "prompt_logprobs": [_round_trip(asdict(report)) for report in value.prompt_logprobs],
            }
        case StepPlan():
            return {
                "step_id": value.step_id,
                "removed_rows": value.removed_rows.tolist(),
                "added_rows": [_new_row_to_json(row) for row in value.added_rows],
                "appended_block_rows": value.appended_block_rows.tolist(),
                "appended_block_ids": value.appended_block_ids.tolist(),
                "chunk_rows": value.chunk_rows.tolist(),
                "chunk_num_tokens": value.chunk_num_tokens.tolist(),
            }
        case StepOutputs():
            return {
                "num_tokens": len(value.token_ids),
                "num_prompt_logprobs": sum(len(report.logprobs) for _, report in value.prompt_logprobs),
                "finished": _to_json(value.finished),
            }
        case list():
            return [_to_json(item) for item in value]
        case FinishedSequence():
            return asdict(value) | {"reason": value.reason.value}
        case WorkerInfo():
            return _round_trip(asdict(value))
        case _:
            return value


def _new_row_to_json(row: NewRow) -> dict[str, Any]:
    return {
        "row": row.row,
        "sequence_id": row.sequence_id,
        "token_ids_xxh64": xxhash.xxh64_hexdigest(row.token_ids.tobytes()),
        "num_tokens": len(row.token_ids),
        "num_prompt_tokens": row.num_prompt_tokens,
        "num_computed_tokens": row.num_computed_tokens,
        "num_cached_tokens": row.num_cached_tokens,
        "block_ids": row.block_ids.tolist(),
        "sampling": asdict(row.sampling),
        "lists_xxh64": xxhash.xxh64_hexdigest(repr(row.lists).encode()) if row.lists else "",
    }


def _round_trip(value: dict[str, Any]) -> dict[str, Any]:
    """Turns tuples into lists, as JSON does, so that a value equals its own recording; and arrays, which JSON lacks."""
    return {
        key: np.asarray(item).tolist() if isinstance(item, tuple | np.ndarray) else item for key, item in value.items()
    }


def _request_from_json(value: dict[str, Any]) -> SequenceRequest:
    return SequenceRequest(
        **value
        | {
            "prompt_token_ids": np.array(value["prompt_token_ids"], np.int32),
            "sampling": RowSampling(**value["sampling"]),
            "lists": _lists_from_json(value["lists"]),
            "stop_token_ids": frozenset(value["stop_token_ids"]),
        }
    )


def _lists_from_json(value: dict[str, Any]) -> SamplingLists:
    lists = SamplingLists(**{key: _as_tuples(item) for key, item in value.items()})
    grammar = value.get("grammar")
    return replace(lists, grammar=Grammar(**grammar)) if grammar is not None else lists


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON has made of tuples, as tuples again."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _result_from_json(value: dict[str, Any]) -> StepResult:
    classes: dict[str, Callable[..., Any]] = {
        "faults": RowFault,
        "logprobs": RowLogprobs,
        "prompt_logprobs": _prompt_logprobs_from_json,
    }
    reports = {
        name: tuple(make(**{key: _as_tuples(item) for key, item in each.items()}) for each in value[name])
        for name, make in classes.items()
    }
    return StepResult(**value | reports)


def _prompt_logprobs_from_json(**value: Any) -> PromptLogprobs:
    types = {"logprobs": np.float32, "ranks": np.int32, "top_token_ids": np.int32, "top_logprobs": np.float32}
    return PromptLogprobs(**value | {name: np.array(value[name], kind) for name, kind in types.items()})


def _worker_from_json(value: dict[str, Any]) -> WorkerInfo:
    return WorkerInfo(**value | {"eos_token_ids": tuple(value["eos_token_ids"])})


def _itself(value: Any) -> Any:
    return value


_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "add": (_request_from_json,),
    "abort": (_itself,),
    "stop": (_itself, _itself),
    "expire": (_itself,),
    "schedule": (_itself,),
    "update": (_result_from_json,),
    "lose_worker": (_itself,),
    "attach_worker": (_worker_from_json,),
    "reset_prefix_cache": (),
}
"""The calls that a file may hold, and how their arguments are read back."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m tandem_scheduler.engine.recorder FILE", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        verdict = replay(path)
    except (RecordingError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    if verdict.is_truncated:
        print(f"{path}: the last line is cut and was left out")
    what = f"{verdict.num_calls} calls, {verdict.num_plans} plans"
    print(f"{path}: {what}: {'identical' if verdict.difference is None else verdict.difference}")
    return 0 if verdict.difference is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
