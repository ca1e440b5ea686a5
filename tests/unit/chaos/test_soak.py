"""The arithmetic of the soak: slopes and their intervals, on series of known slope."""

import numpy as np
import pytest

from tests.chaos.soak.trend import t_quantile, trend

SECONDS = np.arange(1200.0)


def wandering(rng: np.random.Generator, correlation: float) -> np.ndarray:
    """A stationary series whose neighbouring values have this correlation."""
    values = np.empty(len(SECONDS))
    values[0] = rng.normal() / np.sqrt(1 - correlation**2)
    for index, noise in enumerate(rng.normal(size=len(SECONDS) - 1), start=1):
        values[index] = correlation * values[index - 1] + noise
    return values


def test_a_straight_line_has_its_slope_and_no_doubt() -> None:
    found = trend(SECONDS.tolist(), (3 + 0.25 * SECONDS).tolist())
    assert found.slope == pytest.approx(0.25)
    assert found.high - found.low < 1e-6


def test_one_step_is_no_certain_slope() -> None:
    found = trend(SECONDS.tolist(), np.where(SECONDS < 600, 0.0, 1.0).tolist())
    assert found.low < 0 < found.slope == pytest.approx(1.5 / 1200, rel=0.05)


def test_steps_again_and_again_are_a_slope() -> None:
    found = trend(SECONDS.tolist(), (SECONDS // 90).tolist())
    assert 0.009 < found.low < 1 / 90 < found.high < 0.013


@pytest.mark.parametrize("memory", [0.0, 0.9, 0.98])
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_the_interval_holds_the_truth_as_often_as_it_says(memory: float, slope: float) -> None:
    rng = np.random.default_rng(1)
    found = [trend(SECONDS.tolist(), (wandering(rng, memory) + slope * SECONDS).tolist()) for _ in range(200)]
    assert sum(each.low <= slope <= each.high for each in found) >= 0.9 * len(found)


def test_too_little_has_no_trend() -> None:
    with pytest.raises(ValueError, match="too few"):
        trend(range(100), range(100))


@pytest.mark.parametrize(("num_free", "quantile"), [(5, 2.571), (10, 2.228), (38, 2.024), (1000, 1.962)])
def test_t_quantile(num_free: int, quantile: float) -> None:
    assert t_quantile(0.975, num_free) == pytest.approx(quantile, abs=0.005)
