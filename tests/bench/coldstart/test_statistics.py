from __future__ import annotations

import numpy as np
import pytest

from segue.bench.coldstart.statistics import ratio_of_means, ratio_over_best


def test_the_ratio_is_of_medians_over_the_least_of_the_rivals() -> None:
    ratio = ratio_over_best([3.0, 2.0, 100.0], [[4.0, 4.0, 4.0], [1.5, 1.5, 90.0]], seed=0)
    assert ratio.value == 3.0 / 1.5
    assert ratio.lower <= ratio.p10 <= ratio.value <= ratio.p90 <= ratio.upper


def test_equal_timings_leave_no_doubt() -> None:
    ratio = ratio_over_best([2.0] * 7, [[1.0] * 7], seed=0)
    assert (ratio.lower, ratio.value, ratio.upper) == (2.0, 2.0, 2.0)


def test_what_a_round_does_to_all_is_no_spread_of_the_ratio() -> None:
    """Rounds are drawn whole: the machine is twice as slow in some of them, the ratio is the same in each."""
    rounds = np.array([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
    ratio = ratio_over_best(list(1.1 * rounds), [list(rounds)], seed=0)
    assert ratio.lower == pytest.approx(1.1)
    assert ratio.upper == pytest.approx(1.1)


def test_the_bounds_hold_the_true_ratio_as_often_as_they_say() -> None:
    """True ratio 1.2 of lognormal timings; of 300 lower bounds of 95% from 15 rounds about 15 lie above it."""
    random = np.random.default_rng(7)
    above = below = 0
    for trial in range(300):
        own, rival = 1.2 * np.exp(random.normal(0, 0.2, 15)), np.exp(random.normal(0, 0.2, 15))
        ratio = ratio_over_best(list(own), [list(rival)], seed=trial)
        above += ratio.lower > 1.2
        below += ratio.upper < 1.2
    assert 2 <= above <= 36
    assert 2 <= below <= 36


def test_the_bounds_are_those_of_the_seed() -> None:
    timings = [float(value) for value in np.random.default_rng(0).uniform(1, 2, 9)]
    rivals = [[float(value) for value in np.random.default_rng(1).uniform(1, 2, 9)]]
    assert ratio_over_best(timings, rivals, seed=3) == ratio_over_best(timings, rivals, seed=3)


@pytest.mark.parametrize(("timings", "rivals"), [([], [[]]), ([1.0], []), ([1.0], [[1.0, 2.0]])])
def test_rounds_must_be_whole(timings: list[float], rivals: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="one timing for each round"):
        ratio_over_best(timings, rivals, seed=0)


def test_means_are_compared_request_by_request() -> None:
    """Requests differ tenfold, and each takes a tenth longer: their spread is none of the ratio's."""
    times = np.random.default_rng(0).lognormal(0, 1, 40)
    ratio = ratio_of_means(list(1.1 * times), list(times), seed=0)
    assert (ratio.lower, ratio.value, ratio.upper) == pytest.approx((1.1, 1.1, 1.1))
    with pytest.raises(ValueError, match="of the same requests"):
        ratio_of_means([1.0], [1.0, 2.0], seed=0)
