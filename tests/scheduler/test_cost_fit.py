"""Fitting: known coefficients are found again, none is negative, and mixes that were not seen are predicted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.scheduler.cost_fit import StepObservation, fit_step, judge, nonnegative_least_squares
from segue.scheduler.cost_model import LoraForm, StepCoefficients
from tests.scheduler.cost_cases import COEFFICIENTS, batch


def observed(form: LoraForm, seed: int, noise: float, count: int = 200) -> list[StepObservation]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ranks = [draw.choice((0, 8, 16, 32, 64)) for _ in range(draw.choice((1, 4, 16, 64, 128)))]
        # Where a request has several rows, an adapter's weights are read once for all of them.
        load = batch(ranks, context=draw.choice((16, 128, 1024)), rows=draw.choice((1, 1, 4)))
        found.append(StepObservation(load, COEFFICIENTS[form].seconds(load) * draw.uniform(1 - noise, 1 + noise)))
    return found


@pytest.mark.parametrize("form", LoraForm)
def test_the_coefficients_behind_exact_times_are_found(form: LoraForm) -> None:
    found = fit_step(observed(form, seed=1, noise=0.0), form)
    for term in form.terms:
        assert getattr(found, term) == pytest.approx(getattr(COEFFICIENTS[form], term), rel=1e-6)


@pytest.mark.parametrize("form", LoraForm)
def test_steps_that_were_not_seen_are_predicted(form: LoraForm) -> None:
    found = fit_step(observed(form, seed=1, noise=0.05), form)
    quality = judge(found, observed(form, seed=2, noise=0.0))
    assert quality.r_squared > 0.98
    assert quality.mean_relative_error < 0.02
    assert quality.mean_relative_error <= quality.max_relative_error


ROWS = (1, 2, 4, 16, 64, 128, 256, 512, 1024, 2048)


def bent(tokens: int) -> float:
    """One row has kernels of its own, weights bound the products up to 128 rows, arithmetic beyond."""
    return 4e-3 + (1e-3 if tokens > 1 else 0.0) + 6e-6 * tokens + 1.5e-5 * max(0, tokens - 128)


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_line_that_bends_is_followed(noise: float) -> None:
    draw = random.Random(3)
    seen = [
        StepObservation(batch([0], context=1, rows=rows), bent(rows) * draw.uniform(1 - noise, 1 + noise))
        for rows in ROWS * 6
    ]
    found = fit_step(seen, LoraForm.PRESENT_BYTES, (1, 2, 16, 128, 512, 2048))
    others = [StepObservation(batch([0], context=1, rows=rows), bent(rows)) for rows in (8, 32, 96, 192, 768, 1536)]
    assert judge(found, others).max_relative_error < max(1e-6, noise)
    assert list(found.row_seconds) == sorted(found.row_seconds)
    straight = fit_step(seen, LoraForm.PRESENT_BYTES)
    assert judge(straight, others).max_relative_error > 0.1


def test_a_line_that_would_fall_is_flat() -> None:
    """Four rows take less than two: noise, or a kernel that is better at four. More must not cost less."""
    seconds = {1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0}
    seen = [StepObservation(batch([0] * rows, context=1), value) for rows, value in seconds.items()] * 3
    found = fit_step(seen, LoraForm.PRESENT_BYTES, tuple(seconds))
    predicted = [found.seconds(batch([0] * rows, context=1)) for rows in seconds]
    assert predicted == sorted(predicted)
    assert predicted[0] == pytest.approx(1.0)
    # The p with the least (p / 3 - 1)^2 + (p / 2 - 1)^2.
    assert predicted[1] == pytest.approx((1 / 3 + 1 / 2) / (1 / 9 + 1 / 4))
    assert predicted[1] == pytest.approx(predicted[2])


def test_kernels_of_another_form_are_predicted_worse() -> None:
    seen, others = observed(LoraForm.MAX_RANK, 1, 0.0), observed(LoraForm.MAX_RANK, 2, 0.0)
    right, wrong = (judge(fit_step(seen, form), others) for form in (LoraForm.MAX_RANK, LoraForm.PRESENT_BYTES))
    assert right.max_relative_error < 1e-6 < 0.03 < wrong.max_relative_error


@given(
    st.integers(0, 1 << 16), st.integers(5, 12), st.integers(1, 5)
)  # fmt: skip
def test_least_squares_without_negative_terms_is_optimal(seed: int, rows: int, terms: int) -> None:
    """The conditions of Karush, Kuhn and Tucker: no slope at what is positive, none downwards at what is 0."""
    draw = np.random.default_rng(seed)
    columns, target = draw.normal(size=(rows, terms)), draw.normal(size=rows)
    found = nonnegative_least_squares(columns, target)
    slope = columns.T @ (columns @ found - target)
    assert (found >= 0).all()
    assert (slope >= -1e-6).all()
    assert np.abs(slope[found > 0]).max(initial=0.0) < 1e-6


def test_the_quality_of_known_numbers() -> None:
    steps = [StepObservation(batch([0]), 1.0), StepObservation(batch([0]), 3.0)]
    quality = judge(StepCoefficients(fixed_seconds=2.0), steps)
    assert (quality.r_squared, quality.mean_relative_error) == pytest.approx((0.0, (1.0 + 1 / 3) / 2))
    assert quality.max_relative_error == 1.0


def test_too_little_is_refused() -> None:
    steps = observed(LoraForm.MAX_RANK, seed=1, noise=0.0, count=3)
    with pytest.raises(ValueError, match="at least 4 are needed, there are 3"):
        fit_step(steps, LoraForm.MAX_RANK)
    with pytest.raises(ValueError, match="have rows and take time"):
        fit_step([*steps, *steps, StepObservation(batch([8]), 0.0)], LoraForm.MAX_RANK)
    with pytest.raises(ValueError, match="at least one"):
        judge(StepCoefficients(), [])
