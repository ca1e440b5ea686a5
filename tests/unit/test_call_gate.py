"""A connection may have as many calls open as places are left."""

from contextlib import ExitStack

import pytest

from shared.call_gate import CallGate
from shared.errors import QueueFull


def fill(gate: CallGate, peer: str, stack: ExitStack) -> int:
    """Opens calls until one is refused; how many were opened."""
    for count in range(1000):
        try:
            stack.enter_context(gate.pass_through(peer))
        except QueueFull:
            return count
    raise AssertionError("nothing is refused")


def test_greedy_connections_share_alike_and_leave_as_much_to_the_next() -> None:
    gate = CallGate(120)
    with ExitStack() as calls:
        assert fill(gate, "first", calls) == 60
        # The later ones get as much as is left, until the first ones give something back.
        assert [fill(gate, name, calls) for name in ("second", "third", "fourth")] == [30, 15, 8]
        assert fill(gate, "polite", calls) == 4


@pytest.mark.parametrize("num_greedy", [1, 2, 8])
def test_whoever_keeps_coming_back_leaves_places(num_greedy: int) -> None:
    """Places that become free go round: then all greedy connections have the same, and as much is left."""
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
