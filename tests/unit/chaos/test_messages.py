"""How the harness judges hostile messages and the answers to them, without a service."""

from collections.abc import Callable

import pytest
from google.protobuf.message import Message

from tandem.internal.v1 import worker_pb2
from tandem.v1 import inference_pb2
from tests.chaos.messages.hostile_bytes import BYTES, VARINT, draw, fields_of, hostile, mutated, varint, wire_field
from tests.chaos.messages.hostile_sessions import Script
from tests.chaos.messages.raw_calls import _kinds
from tests.chaos.messages.statuses import LEFT_OUT, REFUSED, SERVICES, TABLE, allowed, refusal_of
from tests.contract.services import stream_request
from tests.support.builders import worker_info

MODEL = inference_pb2.GetModelInfoResponse(model="m", vocab_size=1024, max_model_len=512)
CACHED = worker_pb2.NewRow(num_cached_tokens=1, num_computed_tokens=1)
SCRIPT = Script(worker_info(num_blocks=200, max_model_len=512))


def test_every_rpc_has_its_statuses_and_none_is_a_fault_of_the_servers() -> None:
    rpcs = {f"/{name}/{method.name}" for name, service in SERVICES.items() for method in service.methods}
    assert set(TABLE) == rpcs - LEFT_OUT and rpcs > LEFT_OUT
    assert not {"UNKNOWN", "INTERNAL"} & {code.name for codes in TABLE.values() for code in codes}


def test_fields_made_by_hand_are_those_of_the_library() -> None:
    data = wire_field(2, VARINT, varint(300)) + wire_field(1, BYTES, b"hi")
    message = worker_pb2.OpenSession.FromString(wire_field(1, VARINT, varint(300)) + wire_field(2, BYTES, b"hi"))
    assert (message.protocol_version, message.scheduler_id) == (300, "hi")
    assert data == b"\x10\xac\x02\x0a\x02hi"


@pytest.mark.parametrize("kind", [worker_pb2.StepPlan, inference_pb2.GenerateRequest], ids=["plan", "request"])
def test_the_same_seed_draws_the_same_messages_and_most_differ(kind: type[Message]) -> None:
    strategy = fields_of(kind.DESCRIPTOR)
    assert draw(strategy, 50, 3) == draw(strategy, 50, 3) != draw(strategy, 50, 4)
    assert len(set(draw(strategy, 50, 3))) == 50
    kinds = {name for name, _ in draw(hostile(kind), 200, 1)}
    assert {"well-formed", "spoilt", "raw"} <= kinds


def test_a_changed_message_differs_in_a_part() -> None:
    right = stream_request(seed=7, stop_strings=["a"])
    changed = draw(mutated(lambda: type(right).FromString(right.SerializeToString())).map(str), 100, 0)
    assert sum(each != str(right) for each in changed) > 80


@pytest.mark.parametrize(
    ("change", "must_refuse"),
    [
        (lambda plan: None, False),
        (lambda plan: setattr(plan, "step_id", 7), True),
        (lambda plan: plan.chunk_num_tokens.append(1), True),
        (lambda plan: plan.appended_block_rows.append(0), True),
        (lambda plan: setattr(plan.added_rows[0].sampling, "temperature", float("nan")), True),
        (lambda plan: setattr(plan.added_rows[0], "block_ids", plan.added_rows[0].block_ids + b"\0"), True),
        # The plan reads a block that no plan has written, which no worker can see.
        (
            lambda plan: plan.added_rows[0].MergeFrom(worker_pb2.NewRow(num_cached_tokens=1, num_computed_tokens=1)),
            None,
        ),
    ],
    ids=["right", "step id", "counts", "appended", "NaN", "cut ids", "unwritten"],
)
def test_which_plans_must_be_refused(change: Callable[[worker_pb2.StepPlan], None], must_refuse: bool | None) -> None:
    request = SCRIPT.requests()[0]
    change(request.plan)
    if must_refuse is None:
        request.plan.chunk_num_tokens[0] -= 1
    assert SCRIPT.must_refuse(0, request.SerializeToString()) is must_refuse


def test_all_plans_of_the_script_are_right_where_they_stand() -> None:
    for number, request in enumerate(SCRIPT.requests()):
        assert SCRIPT.must_refuse(number, request.SerializeToString()) is False


@pytest.mark.parametrize(
    ("fields", "must_refuse"),
    [
        ({}, False),
        ({"top_p": 0.0}, True),
        ({"num_choices": 65}, True),
        ({"prompt": [1024]}, True),
        ({"prompt": "x"}, None),
    ],
    ids=str,
)
def test_which_requests_must_be_refused(fields: dict[str, object], must_refuse: bool | None) -> None:
    assert refusal_of(stream_request(**fields), MODEL) is must_refuse  # type: ignore[arg-type]


def test_bytes_that_are_no_message_must_be_refused() -> None:
    assert allowed("/tandem.v1.ControlService/GetLoad", "raw", b"\xff", MODEL) == REFUSED


def test_frames_are_told_apart_by_kind() -> None:
    assert _kinds(b"\0\0\2\4\0\0\0\0\0xx" + b"\0\0\0\7\0\0\0\0\0") == {4, 7}
