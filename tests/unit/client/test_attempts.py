"""Which failed calls are repeated, and after what pause."""

import grpc
import pytest

from tandem.calls import FIRST_PAUSE_S, MAX_PAUSE_S, Attempts, metadata_of
from tandem_shared.errors import Draining, InvalidRequest, OutputTooLarge, QueueFull, TandemError, WorkerUnavailable
from tandem_shared.rpc.rich_status import DETAILS_METADATA_KEY, status_of


class Failure(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """A failed call, as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, error: TandemError | None = None) -> None:
        self._code = code
        details = () if error is None else ((DETAILS_METADATA_KEY, status_of(error).SerializeToString()),)
        self._trailing = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._trailing


Failure.__abstractmethods__ = frozenset()

LOST = Failure(grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("error", [QueueFull("full", 3.0), Draining("drains", 3.0), WorkerUnavailable("gone", 3.0)])
def test_refusals_that_pass_are_repeated_when_the_server_advises(error: TandemError) -> None:
    assert Attempts(1, None).pause_after(Failure(grpc.StatusCode.UNAVAILABLE, error)) == 3.0


def test_lost_connections_are_repeated_with_growing_pauses() -> None:
    attempts = Attempts(8, None)
    pauses = [attempts.pause_after(LOST) for _ in range(8)]
    for number, pause_s in enumerate(pauses):
        assert pause_s == pytest.approx(min(FIRST_PAUSE_S * 2**number, MAX_PAUSE_S), rel=0.25)
    with pytest.raises(Failure):
        attempts.pause_after(LOST)


@pytest.mark.parametrize("error", [InvalidRequest(), OutputTooLarge("large")])
def test_other_errors_of_the_server_are_raised(error: TandemError) -> None:
    with pytest.raises(type(error)):
        Attempts(5, None).pause_after(Failure(grpc.StatusCode.UNAVAILABLE, error))


@pytest.mark.parametrize("code", [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED])
def test_other_failures_of_the_transport_are_raised(code: grpc.StatusCode) -> None:
    with pytest.raises(Failure):
        Attempts(5, None).pause_after(Failure(code))


def test_a_pause_that_would_pass_the_deadline_is_not_made() -> None:
    attempts = Attempts(5, 2.0)
    assert attempts.pause_after(LOST) < 1
    left_s = attempts.time_left_s()
    assert left_s is not None and 1.5 < left_s <= 2.0
    with pytest.raises(QueueFull):
        attempts.pause_after(Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull("full", 3.0)))


def test_nothing_is_repeated_once_an_answer_began() -> None:
    attempts = Attempts(5, None)
    attempts.end()
    with pytest.raises(Failure):
        attempts.pause_after(LOST)


def test_names_of_metadata_are_in_lower_case() -> None:
    assert metadata_of((("Authorization", "Bearer A"),), (("x-bin", b"\0"),)) == (
        ("authorization", "Bearer A"),
        ("x-bin", b"\0"),
    )
