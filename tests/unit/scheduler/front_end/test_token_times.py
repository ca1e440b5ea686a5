"""The gaps between tokens, compared with a book that has a line for each token."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tandem_scheduler.front_end.token_times import TokenTimes
from tandem_shared.metrics.histogram import Histogram

BOUNDS = tuple(float(second) for second in range(20))
HANDLES = st.integers(0, 5)
ACTIONS = st.one_of(
    st.lists(HANDLES, min_size=1, max_size=8),
    # The same again, as in steady decoding.
    st.none(),
    st.tuples(st.just("forget"), HANDLES),
)


@given(st.lists(ACTIONS, max_size=40), st.sets(HANDLES))
def test_every_gap_is_counted(actions: list[list[int] | tuple[str, int] | None], live: set[int]) -> None:
    times, gaps, expected = TokenTimes(), Histogram(BOUNDS), Counter[float]()
    newest: dict[int, float] = {}
    batch: list[int] = []
    for now, action in enumerate(actions):
        if isinstance(action, tuple):
            live.discard(action[1])
            newest.pop(action[1], None)
            times.forget(action[1])
            continue
        batch = list(batch) if action is None else action
        if not batch:
            continue
        first = set()
        for handle in batch:
            if handle not in live:
                continue
            if handle in newest:
                expected[now - newest[handle]] += 1
            else:
                first.add(handle)
            newest[handle] = now
        assert set(times.note(batch, now, live, gaps)) == first
    assert gaps.count == expected.total()
    assert gaps.counts[:-1] == [expected[second] for second in BOUNDS] and gaps.counts[-1] == sum(
        count for gap, count in expected.items() if gap > BOUNDS[-1]
    )
    assert gaps.total == sum(gap * count for gap, count in expected.items())
