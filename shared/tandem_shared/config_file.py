"""Reads a file of settings, --config FILE: YAML with the flags' names as keys, as vLLM has it.

    max-num-seqs: 128
    enable-prefix-caching: false

A value is the text that stands in the file, and means what it means behind a flag. So no and 1e5 are a name and a
commit where a name and a commit are asked for, whatever YAML makes of them elsewhere. The file is read as a stream of
YAML's events and nothing is built of it: neither aliases nor nesting can make more of the file than its size.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tandem_shared.errors import ConfigError
from tandem_shared.options import Given

MAX_BYTES = 65536
_NOTHING = ("", "~", "null", "Null", "NULL")


def read_config_file(
    path: str, program: str, known: Collection[str], lists: Collection[str], synonyms: Mapping[str, str]
) -> dict[str, Given]:
    """The values of the fields that the file names, with the place of each for messages about it. A key without a value
    counts as not set.

    known: the fields that the file may name. lists: those of them that may be lists. synonyms: other names -> fields.
    Raises ConfigError for a file that can't be read, another key, one that is given twice, and what is no such file.
    """
    values: dict[str, Given] = {}
    seen: set[str] = set()
    for key, value, line in _pairs(path):
        source = f"{path}, line {line}"
        name = key.replace("-", "_")
        name = synonyms.get(name, name)
        if name not in known:
            names = [other.replace("_", "-") for other in (*known, *synonyms)]
            near = difflib.get_close_matches(key.replace("_", "-"), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{source}: {program} has no setting {key[:80]!r}{hint}")
        if name in seen:
            raise ConfigError(f"{source}: {key} is given twice")
        seen.add(name)
        if isinstance(value, list):
            if name not in lists:
                raise ConfigError(f"{source}: {key} takes one value, not a list")
            value = ",".join(value)
        if value:
            values[name] = Given(value, f"{source}: {key}")
    return values


def _pairs(path: str) -> Iterator[tuple[str, str | list[str], int]]:
    """Keys, their values, and the lines that they are on."""
    events = _events(path)
    wanted = "must hold lines such as max-num-seqs: 128"
    started = [type(event) for event in (next(events), next(events))]
    if started == [yaml.StreamStartEvent, yaml.StreamEndEvent]:
        return
    first = next(events)
    if isinstance(first, yaml.ScalarEvent) and first.value == "" and first.style is None:
        # A document of comments alone.
        return
    if not isinstance(first, yaml.MappingStartEvent):
        raise ConfigError(f"{path}: {wanted}")
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent):
            raise ConfigError(f"{path}, line {line}: {wanted}")
        yield event.value, _value(next(events), events, f"{path}, line {line}: {event.value[:80]}"), line
    next(events)
    if not isinstance(event := next(events), yaml.StreamEndEvent):
        raise ConfigError(f"{path}, line {event.start_mark.line + 1}: must hold one document")


def _value(event: Any, events: Iterator[Any], source: str) -> str | list[str]:
    if isinstance(event, yaml.ScalarEvent):
        return "" if event.style is None and event.value in _NOTHING else str(event.value)
    if isinstance(event, yaml.SequenceStartEvent):
        values = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError(f"{source}: a list must hold plain values")
            values.append(str(event.value))
        return values
    raise ConfigError(f"{source}: must have a plain value or a list of them")


def _events(path: str) -> Iterator[Any]:
    """YAML's events, none of which has an anchor, an alias or a tag."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"--config {path}: is larger than {MAX_BYTES} bytes")
    try:
        for event in yaml.parse(data, Loader=yaml.BaseLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: anchors, aliases and tags are not taken")
            yield event
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
