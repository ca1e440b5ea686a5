"""Errors as statuses: the tree in errors.py, the tables in rich_status.py and the protos' lists of reasons agree."""

import inspect
import re

import grpc
import pytest
from google.rpc import error_details_pb2

from tandem.internal.v1 import worker_pb2
from tandem.v1 import error_reason_pb2
from tandem_shared import errors
from tandem_shared.errors import ConfigError, FieldViolation, InvalidRequest, RetryLater, TandemError
from tandem_shared.rpc.rich_status import CLASSES, STATUS_CODES, code_of, read_status, status_of
from tools.generate_stubs import PROTOS

ENUMS = {
    each.full_name.removesuffix(".ErrorReason"): each
    for each in (error_reason_pb2.ErrorReason.DESCRIPTOR, worker_pb2.ErrorReason.DESCRIPTOR)
}
"""The enums by their package, which is the domain."""
PREFIX = "ERROR_REASON_"


def info_of(error: TandemError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status_of(error).details)
    return info


def made(error_class: type[TandemError]) -> TandemError:
    return InvalidRequest(FieldViolation("prompt", "is empty")) if error_class is InvalidRequest else error_class("why")


def test_the_protos_list_the_reasons_that_are_sent() -> None:
    sent = {(info.domain, info.reason) for info in (info_of(made(each)) for each in STATUS_CODES)}
    listed = {
        (domain, name.removeprefix(PREFIX))
        for domain, enum in ENUMS.items()
        for name, value in enum.values_by_name.items()
        if value.number
    }
    assert sent == listed == set(CLASSES)
    assert all(re.fullmatch("[A-Z][A-Z0-9_]{1,61}[A-Z0-9]", reason) for _, reason in sent)


def test_the_protos_state_the_statuses() -> None:
    stated = {
        (domain, name.removeprefix(PREFIX)): code
        for domain, enum in ENUMS.items()
        for code, name in re.findall(
            rf"  // ([A-Z_]+): .+\n(?:  // .+\n)*  ({PREFIX}\w+) =",
            (PROTOS / enum.file.name).read_text(),
        )
    }
    assert stated == {key: STATUS_CODES[error_class].name for key, error_class in CLASSES.items()}


def test_the_tree_states_the_statuses() -> None:
    tree = dict(re.findall(r"── (\w+) +([A-Z_]+|never sent)(?=[,: (]|$)", inspect.getdoc(errors) or "", re.MULTILINE))
    sent = {each.__name__: code.name for each, code in STATUS_CODES.items()}
    never_sent = {"ModelError": "never sent", "ConfigError": "never sent"}
    assert tree == sent | never_sent
    classes = {each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, TandemError)}
    assert {each.__name__ for each in classes - {TandemError, RetryLater}} == set(tree)


@pytest.mark.parametrize("error_class", STATUS_CODES)
def test_a_client_reads_what_the_server_wrote(error_class: type[TandemError]) -> None:
    error = made(error_class)
    if isinstance(error, RetryLater):
        error.retry_after_s = 2.5
    read = read_status(status_of(error))
    assert type(read) is error_class and str(read) == str(error) and vars(read) == vars(error)


def test_an_error_of_a_derived_class_is_sent_as_the_class_it_derives_from() -> None:
    class Full(errors.QueueFull):
        pass

    assert code_of(Full("full")) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(read_status(status_of(Full("full")))) is errors.QueueFull


def test_an_error_that_is_not_meant_to_be_sent_has_no_reason() -> None:
    status = status_of(ConfigError("a secret path"))
    assert status.code == code_of(ConfigError("")).value[0] == grpc.StatusCode.INTERNAL.value[0]
    assert not status.details and read_status(status) is None


def test_reasons_of_other_domains_are_not_read() -> None:
    status = status_of(errors.QueueFull("full"))
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="other.example")
    status.details[0].Pack(info)
    assert read_status(status) is None
