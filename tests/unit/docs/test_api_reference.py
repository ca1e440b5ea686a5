"""docs/api.md against the descriptors of the stubs and the statuses that the chaos harness allows: it is current, has
everything, and its comments state errors and defaults.
"""

import re

import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc import StatusCode

from tandem.v1 import control_pb2, error_reason_pb2, inference_pb2
from tests.chaos.messages.statuses import TABLE
from tests.support.requirements import ROOT
from tools.api_reference import Reference, read_files

FILES = [each.DESCRIPTOR for each in (inference_pb2, control_pb2, error_reason_pb2)]
TEXT = (ROOT / "docs" / "api.md").read_text()
SECTIONS = dict(re.findall(r"^##+ (\w+)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))

NOT_FUZZED = {
    StatusCode.INTERNAL,
    StatusCode.UNAVAILABLE,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
}
"""Statuses of faults, ends, stalls and keys, which the harness of wrong messages does not bring about."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(read_files())


def test_it_is_current(reference: Reference) -> None:
    assert reference.text() == TEXT, "run make protos"


def test_it_has_every_rpc_field_and_value() -> None:
    for file in FILES:
        for service in file.services_by_name.values():
            for rpc in service.methods:
                section = SECTIONS[rpc.name]
                assert f"[{rpc.input_type.name}]" in section and f"[{rpc.output_type.name}]" in section
                assert (" → a stream of " in section) == rpc.server_streaming
        for message in file.message_types_by_name.values():
            named = re.findall(r"^\| `(\w+)` \|", SECTIONS[message.name], re.MULTILINE)
            assert named == [field.name for field in message.fields]
        for enum in file.enum_types_by_name.values():
            assert re.findall(r"^\| `(\w+)` \|", SECTIONS[enum.name], re.MULTILINE) == list(enum.values_by_name)


def test_its_links_lead_to_headings() -> None:
    links = set(re.findall(r"\]\(#(.*?)\)", TEXT))
    assert links and links <= {name.lower() for name in re.findall(r"^##+ (.*)", TEXT, re.MULTILINE)}


def test_rpcs_state_the_errors_that_the_harness_allows(reference: Reference) -> None:
    rpcs = list(reference.rpcs())
    everywhere = set(re.findall(r"^- ([A-Z_]+):", SECTIONS["InferenceService"], re.MULTILINE))
    assert {(service, rpc.name) for service, rpc, _ in rpcs} == {
        (service.name, rpc.name)
        for file in FILES
        for service in file.services_by_name.values()
        for rpc in service.methods
    }
    for service, rpc, comment in rpcs:
        own = {reference.status_of(reason) for reason in reference.reasons_of(comment)}
        stated = {StatusCode[name] for name in everywhere | own}
        allowed = TABLE[f"/tandem.v1.{service}/{rpc.name}"] - {StatusCode.OK}
        assert allowed <= stated <= allowed | NOT_FUZZED, rpc.name


def test_what_a_request_may_leave_out_has_a_default() -> None:
    requests = ["GenerateRequest", "SamplingParams", "StoppingCriteria", "OutputOptions", "Chat", "ChatMessage"]
    choices = {"Prompt", "StructuredOutput"}
    for name in requests:
        descriptor = inference_pb2.DESCRIPTOR.message_types_by_name[name]
        for field in descriptor.fields:
            row = re.search(rf"^\| `{field.name}` \| (.*?) \| (.*) \| (.*?) \|$", SECTIONS[name], re.MULTILINE)
            assert row, f"{name}.{field.name}"
            is_required = "Required." in row[2] or (name, field.name) == ("Chat", "messages")
            assert bool(row[3].strip()) != is_required, f"{name}.{field.name}"
            assert "Default" not in row[2], f"{name}.{field.name}"
            is_scalar = field.type != FieldDescriptor.TYPE_MESSAGE and not field.is_repeated
            assert row[1].startswith("optional ") == (is_scalar and not is_required), f"{name}.{field.name}"
    assert all("| default |" not in SECTIONS[name] for name in choices)


def test_an_unknown_reason_is_refused(reference: Reference) -> None:
    with pytest.raises(ValueError, match="ErrorReason has no QUEUE_FUL"):
        reference.reasons_of(" Ends.\n\n Errors: QUEUE_FUL, DRAINING.\n")
