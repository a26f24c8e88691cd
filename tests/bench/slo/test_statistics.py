"""Intervals and indices against published values and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.bench.slo.statistics import jain_index, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table
        # I, method 3: the score interval without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_as_published(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_it_covers_the_true_share_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).binomial(400, 0.95, size=4000)
    intervals = [wilson_interval(int(draw), 400, 0.9) for draw in draws]
    assert np.mean([low <= 0.95 <= high for low, high in intervals]) == pytest.approx(0.9, abs=0.02)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_it_holds_the_share_that_was_seen(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    low, high = wilson_interval(successes, trials, confidence)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (2, 1), (-1, 3)])
def test_what_cannot_be_counted_is_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes must be"):
        wilson_interval(successes, trials)


def test_jains_index_is_one_for_equals_and_falls_to_one_over_n() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == 1.0
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == 0.25
    # Half of ten users share all: the index says that half are served.
    assert jain_index([1.0] * 5 + [0.0] * 5) == 0.5
    assert jain_index([0.0, 0.0]) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        jain_index([])
