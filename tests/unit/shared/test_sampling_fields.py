"""The table of sampling fields: what users are told, that the protos agree, and that a new field is a few lines."""

import dataclasses
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from tandem.internal.v1 import worker_pb2
from tandem.sampling_params import SamplingParams
from tandem.v1 import inference_pb2
from tandem_shared.sampling_fields import (
    FIELDS,
    MODEL_DEFAULT_FIELDS,
    REQUEST_FIELDS,
    RowSampling,
    SamplingField,
    fields_out_of_range,
)
from tandem_worker.checkpoint.generation_config import IGNORED

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE_FOLDERS = ("tandem", "shared", "gateway_service", "scheduler_service", "worker_service", "protos", "tools")

WIRE_TYPES = {
    (float, 3.4028234663852886e38): FieldDescriptor.TYPE_FLOAT,
    (int, 2**32 - 1): FieldDescriptor.TYPE_UINT32,
    (int, 2**64 - 1): FieldDescriptor.TYPE_UINT64,
}
"""(kind, the largest number of the wire's type) -> the wire's type, smaller ones first."""

ADDED_LINES = {
    "shared/tandem_shared/sampling_fields.py": (
        '    seed: int = ', '    typical_p: float = _declare(0.0, -2, 2, device_type="float32")'
    ),
    "protos/tandem/v1/inference.proto": (
        "  // Seeds the random numbers: ", "  optional float typical_p = 60;"
    ),
    "protos/tandem/internal/v1/worker.proto": (
        "  // Seeds the random numbers.", "  float typical_p = 60;"
    ),
    "tandem/sampling_params.py": ("    seed: int | None", "    typical_p: float | None = None"),
}  # fmt: skip
"""All that a new number needs but for its meaning: file -> the start of a line, and the line that goes before it."""


def wire_type(field: SamplingField) -> int:
    return next(each for (kind, most), each in WIRE_TYPES.items() if kind is field.kind and field.most <= most)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (RowSampling(choice_index=-1), "choice_index must be 0 to 2^32 - 1"),
        (RowSampling(temperature=-0.5), "sampling.temperature must be 0 or more and finite, is -0.5"),
        (RowSampling(temperature=math.inf), "sampling.temperature must be 0 or more and finite, is inf"),
        (RowSampling(top_k=-1), "sampling.top_k must be 0 to 2^32 - 1"),
        (RowSampling(top_p=0.0), "sampling.top_p must be in (0, 1], is 0.0"),
        (RowSampling(top_p=math.nan), "sampling.top_p must be in (0, 1], is nan"),
        (RowSampling(min_p=1.5), "sampling.min_p must be in [0, 1], is 1.5"),
        (RowSampling(seed=2**64), "sampling.seed must be 0 to 2^64 - 1"),
        (RowSampling(num_logprobs=21), "output.num_logprobs must be at most 20"),
        (RowSampling(num_logprobs=-1), "output.num_logprobs must be at most 20"),
    ],
)
def test_a_wrong_value_is_told_with_its_range(sampling: RowSampling, told: str) -> None:
    [field] = fields_out_of_range(sampling)
    assert f"{field.path} {field.problem(getattr(sampling, field.name))}" == told


@pytest.mark.parametrize(
    ("least", "most", "text"),
    [
        (-2, 2, "in [-2, 2]"),
        (math.ulp(0.0), 2, "in (0, 2]"),
        (math.ulp(0.0), 3.4028234663852886e38, "above 0 and finite"),
    ],
)
def test_ranges_that_no_field_has_yet_are_told_too(least: float, most: float, text: str) -> None:
    assert SamplingField("some", float, 1.0, least, most).range_text == text


def test_the_limits_themselves_are_right() -> None:
    lowest = RowSampling(0.0, 0, 5e-324, 0.0, -2.0, -2.0, 5e-324, 0, 0, 0, 0, 0)
    largest = 3.4028234663852886e38
    highest = RowSampling(largest, 2**32 - 1, 1.0, 1.0, 2.0, 2.0, largest, 2**64 - 1, 2**32 - 1, 2**32 - 1, 20, 20)
    assert fields_out_of_range(lowest) == fields_out_of_range(highest) == fields_out_of_range(RowSampling()) == []


def test_what_the_wire_would_round_out_of_range_is_not_allowed() -> None:
    top_p = next(field for field in FIELDS if field.name == "top_p")
    assert top_p.allows(1e-45) and not top_p.allows(1e-60)
    assert top_p.allows(1) and not top_p.allows(math.nan)


def test_the_workers_proto_has_the_same_fields() -> None:
    wire = worker_pb2.RowSampling.DESCRIPTOR.fields
    assert [(each.name, each.type) for each in wire] == [(field.name, wire_type(field)) for field in FIELDS]
    assert [each.has_presence for each in wire] == [field.default is None for field in FIELDS]


def test_the_public_proto_has_the_same_fields() -> None:
    wire = inference_pb2.SamplingParams.DESCRIPTOR.fields
    scalars = [each for each in wire if not each.is_repeated]
    assert [(each.name, each.type) for each in scalars] == [(field.name, wire_type(field)) for field in REQUEST_FIELDS]
    assert all(each.has_presence for each in scalars)
    for field in FIELDS:
        if field.part:
            part = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[field.part].message_type
            assert part.fields_by_name[field.name].type == wire_type(field)


def test_the_public_proto_states_ranges_and_defaults() -> None:
    text = (REPOSITORY / "protos/tandem/v1/inference.proto").read_text()
    for field in REQUEST_FIELDS:
        match = re.search(rf"((?:  //.*\n)+)  optional \w+ {field.name} = ", text)
        comment = " ".join(line.strip(" /") for line in match[1].splitlines()) if match else ""
        if field.has_model_default:
            assert f"Default {field.default:g}." in comment
        if field.range_text.startswith("in "):
            assert field.range_text in comment


def test_the_docs_have_every_field_and_the_tables_ranges_and_defaults() -> None:
    text = (REPOSITORY / "docs/sampling.md").read_text()
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` \|.*$", text, re.MULTILINE)}
    for part in ("sampling", "stopping", "output", "structured_output"):
        message = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name[part].message_type
        assert {field.name for field in message.fields} <= rows.keys()
    for name in {field.name for field in dataclasses.fields(SamplingParams)} - {"n"}:
        assert f"`{name}`" in text or f"`{name}=" in text, name
    for field in REQUEST_FIELDS:
        assert f"| {field.range_text} |" in rows[field.name]
        if field.name != "seed":
            mark = " (m)" if field.has_model_default else ""
            assert f"| {field.default:g}{mark} |" in rows[field.name]


def test_the_workers_info_has_the_models_defaults() -> None:
    wire = worker_pb2.GetWorkerInfoResponse.DESCRIPTOR.fields
    assert [(each.name, each.type) for each in wire if each.name.startswith("default_")] == [
        (f"default_{field.name}", wire_type(field)) for field in MODEL_DEFAULT_FIELDS
    ]
    assert not {field.name for field in MODEL_DEFAULT_FIELDS} & IGNORED.keys()


def test_the_clients_params_have_the_fields_of_a_request() -> None:
    types = inspect.get_annotations(SamplingParams)
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for field in REQUEST_FIELDS:
        assert (types[field.name], defaults[field.name]) == (field.kind | None, None)


def test_a_new_field_is_a_line_in_each_of_four_files(tmp_path: Path) -> None:
    for folder in SOURCE_FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*_pb2*", "embedded_model")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignore)
    for name, (start, line) in ADDED_LINES.items():
        file = tmp_path / name
        text, count = re.subn(rf"(?=^{re.escape(start)})", f"{line}\n", file.read_text(), flags=re.MULTILINE)
        assert count == 1
        file.write_text(text)
    folders = [tmp_path, *(tmp_path / folder for folder in SOURCE_FOLDERS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    for command in (["-m", "tools.generate_stubs"], ["-P", str(Path(__file__).with_name("added_field.py"))]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "told, checked and on the device\n"
