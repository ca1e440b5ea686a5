"""Writes docs/api.md, the reference of the public API, from the protos of tandem.v1 and their comments. With --check,
fails where the committed file differs instead.

A comment is prose, but for two things. A sentence that begins with "Default" goes into a column of its own. A paragraph
`Errors: A, B.` or `Errors of every RPC: A, B.` lists reasons of ErrorReason, which are shown with their statuses.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

from tools.generate_stubs import PROTOS, ROOT
from tools.generated_file import write_or_check

PACKAGE = "tandem.v1"
FILES = ("inference.proto", "control.proto", "error_reason.proto")
REFERENCE = ROOT / "docs" / "api.md"
REASONS = "ErrorReason"
PREFIX = "ERROR_REASON_"

HEAD = f"""# API reference

<!-- Made from protos/tandem/v1 by `make protos`; a change made here is lost. -->

The package `{PACKAGE}`, over gRPC. [sampling.md](sampling.md) has more on sampling, [python.md](python.md) on the
Python client, and [http.md](http.md) on OpenAI's API.

A field that is *optional* may be left out; then its default holds, and the server can tell that from a field that was
set to zero. A field that is neither optional nor a list nor a message is 0, false or empty where it is left out.
"""

# Numbers of fields in google/protobuf/descriptor.proto, of which the paths to comments are made.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS = VALUES = METHODS = 2
Place = tuple[int, ...]
"""A path of field numbers and indices to a part of a file, as source_code_info has it."""


def read_files() -> list[FileDescriptorProto]:
    """The descriptors of FILES, with comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
        names = [f"{PACKAGE.replace('.', '/')}/{name}" for name in FILES]
        subprocess.run([*command, "--include_source_info", f"--descriptor_set_out={out}", *names], check=True)
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


class Reference:
    """The text of the reference. Raises ValueError for what it can't refer to."""

    def __init__(self, files: list[FileDescriptorProto]) -> None:
        self._files = files
        self._comments: dict[int, dict[Place, str]] = {
            id(file): {tuple(at.path): at.leading_comments for at in file.source_code_info.location} for file in files
        }
        headings = [name for file in files for name in _headings(file)]
        self._anchors = {name: name.lower() for name in headings}
        if len(set(self._anchors.values())) < len(headings):
            raise ValueError(f"two of these headings have one anchor: {sorted(headings)}")
        self._statuses = dict(self._read_statuses())
        self._enums = {value.name: enum.name for file in files for enum in file.enum_type for value in enum.value}
        self._words = re.compile(rf"`[^`]*`|\b(?:{'|'.join(headings)})\b|\b\w+_\w+(?:\.json)?\b|[<|*]")

    def text(self) -> str:
        lines = [HEAD, *self._contents(), ""]
        for file in self._files:
            for index, service in enumerate(file.service):
                lines += self._service(file, service, (SERVICES, index))
            if file.service:
                lines += [f"## Messages of {file.service[0].name}", ""]
            level = "###" if file.service else "##"
            kinds = [(MESSAGES, index) for index in range(len(file.message_type))]
            kinds += [(ENUMS, index) for index in range(len(file.enum_type))]
            for path in sorted(kinds, key=self._line_numbers(file).__getitem__):
                if path[0] == MESSAGES:
                    lines += self._message(file, file.message_type[path[1]], path, level)
                else:
                    lines += self._enum(file, file.enum_type[path[1]], path, level)
        return "\n".join(lines).rstrip() + "\n"

    def reasons_of(self, comment: str) -> list[str]:
        """The reasons that a comment lists."""
        found = re.search(r"^ ?Errors(?: of every RPC)?: ((?:[A-Z_]+[,\s]*)+)\.$", comment, re.MULTILINE)
        reasons = re.findall("[A-Z_]+", found[1]) if found else []
        if unknown := set(reasons) - set(self._statuses):
            raise ValueError(f"{REASONS} has no {', '.join(sorted(unknown))}")
        return reasons

    def rpcs(self) -> Iterator[tuple[str, MethodDescriptorProto, str]]:
        """Each RPC with the name of its service and its comment."""
        for file in self._files:
            for index, service in enumerate(file.service):
                for number, rpc in enumerate(service.method):
                    yield service.name, rpc, self._comments[id(file)][SERVICES, index, METHODS, number]

    def status_of(self, reason: str) -> str:
        return self._statuses[reason]

    def _read_statuses(self) -> Iterator[tuple[str, str]]:
        for file in self._files:
            for index, enum in enumerate(file.enum_type):
                if enum.name == REASONS:
                    for number, value in enumerate(enum.value):
                        comment = self._comments[id(file)][ENUMS, index, VALUES, number]
                        if stated := re.match(r"\s*([A-Z_]+): ", comment):
                            yield value.name.removeprefix(PREFIX), stated[1]

    @staticmethod
    def _line_numbers(file: FileDescriptorProto) -> dict[Place, int]:
        return {tuple(at.path): at.span[0] for at in file.source_code_info.location}

    def _contents(self) -> Iterator[str]:
        for file in self._files:
            for service in file.service:
                rpcs = ", ".join(self._link(rpc.name) for rpc in service.method)
                yield f"- {self._link(service.name)}: {rpcs}"
            kinds = ", ".join(self._link(name) for name in sorted(_kinds(file)))
            yield f"  - its messages: {kinds}" if file.service else f"- {kinds}"

    def _service(self, file: FileDescriptorProto, service: ServiceDescriptorProto, path: Place) -> Iterator[str]:
        comments = self._comments[id(file)]
        yield from (f"## {service.name}", "", *self._prose(comments[path]))
        for number, rpc in enumerate(service.method):
            stream = "a stream of " if rpc.server_streaming else ""
            yield from (f"### {rpc.name}", "")
            yield f"{self._link(_local(rpc.input_type))} → {stream}{self._link(_local(rpc.output_type))}"
            yield from ("", *self._prose(comments[*path, METHODS, number]))

    def _message(self, file: FileDescriptorProto, message: DescriptorProto, path: Place, level: str) -> Iterator[str]:
        comments = self._comments[id(file)]
        yield from (f"{level} {message.name}", "", *self._prose(comments[path]))
        if not message.field:
            return
        split = [_split_default(comments[*path, FIELDS, number]) for number in range(len(message.field))]
        has_defaults = any(default for _, default in split)
        yield "| field | type | meaning | default |" if has_defaults else "| field | type | meaning |"
        yield "|---|---|---|---|" if has_defaults else "|---|---|---|"
        for field, (meaning, default) in zip(message.field, split, strict=True):
            cells = [f"`{field.name}`", self._type(message, field), self._inline(meaning)]
            yield f"| {' | '.join([*cells, self._inline(default)] if has_defaults else cells)} |"
        yield ""

    def _enum(self, file: FileDescriptorProto, enum: EnumDescriptorProto, path: Place, level: str) -> Iterator[str]:
        comments = self._comments[id(file)]
        yield from (f"{level} {enum.name}", "", *self._prose(comments[path]), "| value | meaning |", "|---|---|")
        for number, value in enumerate(enum.value):
            yield f"| `{value.name}` | {self._inline(comments[*path, VALUES, number])} |"
        yield ""

    def _type(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        entries = {each.name: each for each in message.nested_type if each.options.map_entry}
        if entry := entries.get(_local(field.type_name)):
            key, value = (self._type(entry, each) for each in entry.field)
            return f"map of {key} to {value}"
        if field.type_name:
            name = _local(field.type_name)
            text = self._link(name) if name in self._anchors else f"`{field.type_name.lstrip('.')}`"
        else:
            text = f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"list of {text}"
        if field.proto3_optional:
            return f"optional {text}"
        if field.HasField("oneof_index"):
            return f"{text}, one of `{message.oneof_decl[field.oneof_index].name}`"
        return text

    def _prose(self, comment: str) -> Iterator[str]:
        for paragraph in re.split(r"\n\s*\n", comment.strip()):
            if reasons := self.reasons_of(paragraph):
                by_status: dict[str, list[str]] = {}
                for reason in reasons:
                    by_status.setdefault(self._statuses[reason], []).append(reason)
                yield f"**{paragraph.strip().partition(':')[0]}**, by status:"
                yield ""
                for status, names in by_status.items():
                    yield f"- {status}: {', '.join(f'[`{name}`](#{self._anchors[REASONS]})' for name in names)}"
            else:
                yield self._inline(paragraph)
            yield ""

    def _inline(self, text: str) -> str:
        """A text of one line, in which names of this reference are links."""
        text = " ".join(text.split())

        def mark(found: re.Match[str]) -> str:
            word = found[0]
            if word in self._anchors:
                # The first word of a sentence has a capital whether it is a name or not.
                is_plain = word.istitle() and re.search(r"(^|[.:] )$", text[: found.start()])
                return word if is_plain else self._link(word)
            if word in self._enums:
                return f"[`{word}`](#{self._anchors[self._enums[word]]})"
            if len(word) == 1:
                return f"\\{word}"
            return word if word.startswith("`") or word.isupper() else f"`{word}`"

        return self._words.sub(mark, text)

    def _link(self, name: str) -> str:
        return f"[{name}](#{self._anchors[name]})"


def _headings(file: FileDescriptorProto) -> Iterator[str]:
    for service in file.service:
        yield service.name
        yield from (rpc.name for rpc in service.method)
    yield from _kinds(file)


def _kinds(file: FileDescriptorProto) -> list[str]:
    return [each.name for each in [*file.message_type, *file.enum_type]]


def _local(name: str) -> str:
    return name.rpartition(".")[2]


def _split_default(comment: str) -> tuple[str, str]:
    """What a field means, and its default if the comment states one."""
    meaning, stated, default = " ".join(comment.split()).rpartition("Default")
    if not stated or not re.search(r"(^|\. )$", meaning):
        return comment, ""
    return meaning, default.strip(" :").removesuffix(".")


def main() -> int:
    """Exit status 1 if --check finds a difference."""
    stale = "docs/api.md differs from what protos gives; run make protos"
    return write_or_check(REFERENCE, Reference(read_files()).text(), stale)


if __name__ == "__main__":
    sys.exit(main())
