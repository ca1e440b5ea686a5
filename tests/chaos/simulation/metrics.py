"""What must be true of the metrics in a simulated world, whatever breaks: counts never go back, and at the end they are
what the world itself has counted.
"""

from collections import Counter
from typing import TYPE_CHECKING

from tandem_scheduler.engine.observer import Event, RequestSubmitted
from tandem_scheduler.observers import definitions as d
from tandem_scheduler.observers.metrics import SchedulerMetrics
from tandem_shared.metrics.exposition import Metric
from tandem_shared.metrics.histogram import Histogram

if TYPE_CHECKING:
    from tests.chaos.simulation.world import World

Values = dict[tuple[Metric, tuple[str, ...]], float | Histogram]


class WatchedMetrics:
    """The scheduler's metrics, with a count of their own of what was submitted."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._metrics = SchedulerMetrics()
        self.times = self._metrics.times
        self._num_choices = Counter[int]()
        self._before: Values = {}

    def tell(self, event: Event) -> None:
        if isinstance(event, RequestSubmitted):
            self._num_choices[event.num_choices] += 1
        self._metrics.tell(event)

    def check(self) -> Values:
        """Checks that nothing has gone back since the last check. Returns the values of now."""
        values: Values = {
            (metric, labels): value
            for metric, by_label in self._metrics.samples(self._world.hub)
            for labels, value in by_label.items()
        }
        for key, before in self._before.items():
            if key[0].kind == "gauge":
                continue
            now = values[key]
            if isinstance(before, Histogram) and isinstance(now, Histogram):
                is_less = any(new < old for new, old in zip(now.counts, before.counts, strict=True))
                self._claim(not is_less and now.total >= before.total, f"{key[0].name} has gone back")
            else:
                self._claim(now >= before, f"{key[0].name} has gone back from {before} to {now}")  # type: ignore[operator]
        self._before = values
        return values

    def check_end(self) -> None:
        """Checks the counts of a world that has ended, whose requests are all closed."""
        values, world = self.check(), self._world
        scheduler = world.step_loop.scheduler
        assert scheduler is not None
        load, num_choices = scheduler.load(), sum(n * count for n, count in self._num_choices.items())
        numbers = {
            "sequences that have ended": (self._total(values, d.REQUEST_SUCCESS), num_choices),
            "choices": (self._histogram(values, d.REQUEST_PARAMS_N).total, num_choices),
            "requests": (self._histogram(values, d.REQUEST_PARAMS_N).count, self._num_choices.total()),
            "output tokens": (self._total(values, d.GENERATION_TOKENS), world.sink.num_tokens.total()),
            "steps": (self._histogram(values, d.ITERATION_TOKENS).count, load.num_steps),
            "losses": (self._total(values, d.WORKER_LOSSES), load.num_worker_losses),
            "prompt tokens": (self._total(values, d.PREFIX_CACHE_QUERIES), sum(world.planned.values())),
        }
        for what, (counted, true) in numbers.items():
            self._claim(counted == true, f"the metrics have {counted:g} {what}, not {true}")
        for what, held in (("metrics", self._metrics.num_held), ("events", world.hub.num_observed)):
            self._claim(not held, f"the {what} hold {held} requests that have ended")

    def _total(self, values: Values, metric: Metric) -> float:
        return sum(value for key, value in values.items() if key[0] is metric and not isinstance(value, Histogram))

    def _histogram(self, values: Values, metric: Metric) -> Histogram:
        value = values[metric, ()]
        assert isinstance(value, Histogram)
        return value

    def _claim(self, is_true: bool, what: str) -> None:
        if not is_true:
            self._world.fail(what)
