"""How many calls a connection gets: beyond the unshared places, as many as there are places left."""

from contextlib import ExitStack

import pytest

from tandem_shared.errors import QueueFull
from tandem_shared.rpc.call_gate import CallGate


def fill(gate: CallGate, peer: str, stack: ExitStack) -> int:
    """Opens calls until one is refused, and returns how many were opened."""
    for count in range(5000):
        try:
            stack.enter_context(gate.pass_through(peer))
        except QueueFull:
            return count
    raise AssertionError("nothing is refused")


def test_connections_that_end_no_call_take_all_places_and_the_gate_says_so() -> None:
    """Shares alone do not keep a place for a late client: a call must end, and the gate says so through if_full."""
    gate, told = CallGate(120), []
    with ExitStack() as calls:
        for name in "abcdef":
            fill(gate, name, calls)
        assert fill(gate, "greedy", calls) == 1
        with pytest.raises(QueueFull), gate.pass_through("late", lambda: told.append("full")):
            pass
    assert told == ["full"]


def test_a_refusal_while_places_are_left_is_the_connections_own_affair() -> None:
    gate, told = CallGate(10), []
    with ExitStack() as calls:
        fill(gate, "greedy", calls)
        with pytest.raises(QueueFull), gate.pass_through("greedy", lambda: told.append("full")):
            pass
    assert told == []


@pytest.mark.parametrize("num_waiting", [1, 100, 256, 4096])
def test_one_connection_alone_fills_the_batch(num_waiting: int) -> None:
    num_rows = 256
    gate = CallGate(num_rows + num_waiting + 64, num_unshared=num_rows)
    with ExitStack() as calls:
        assert fill(gate, "gateway", calls) >= num_rows
        assert fill(gate, "polite", calls) >= 32


def test_a_connection_has_its_most_whatever_is_left() -> None:
    gate = CallGate(100, max_per_connection=10)
    with ExitStack() as calls:
        assert [fill(gate, name, calls) for name in "abc"] == [10, 10, 10]


@pytest.mark.parametrize("num_greedy", [1, 2, 8])
def test_whoever_keeps_coming_back_leaves_places(num_greedy: int) -> None:
    """As places become free and are taken again, all greedy connections get the same number, and as many are left."""
    gate = CallGate(900)
    stacks = [ExitStack() for _ in range(num_greedy)]
    for _ in range(300):
        for index, stack in enumerate(stacks):
            stack.close()
            fill(gate, f"greedy {index}", stack)
    with ExitStack() as polite:
        assert fill(gate, "polite", polite) >= 900 // (num_greedy + 1) // 2 - 1
    for stack in stacks:
        stack.close()


def test_a_closed_call_gives_its_place_back() -> None:
    gate = CallGate(2)
    for _ in range(5):
        with gate.pass_through("one"), pytest.raises(QueueFull), gate.pass_through("one"):
            pass


def test_a_call_that_fails_gives_its_place_back() -> None:
    gate = CallGate(2)
    for _ in range(5):
        with pytest.raises(ValueError, match="no"), gate.pass_through("one"):
            raise ValueError("no")
