"""The online correction: it finds what the profile misses, and no outlier moves it out of its bounds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.config import ConfigError
from segue.scheduler.cost_correction import Correction, CorrectionLimits, ProfileCorrection
from segue.scheduler.cost_model import LoraForm, StepLoad
from tests.scheduler.cost_cases import COEFFICIENTS, PROFILE, batch, ranks

STEP = COEFFICIENTS[LoraForm.SUM_OF_RANKS]


def some_step(draw: random.Random) -> StepLoad:
    widths = [draw.choice((0, 8, 16, 64)) for _ in range(draw.randint(1, 128))]
    return batch(widths, context=draw.choice((16, 512, 8192)))


def after(correction: Correction, steps: int, true_scales: tuple[float, float, float], outliers: float) -> Correction:
    draw = random.Random(7)
    for _ in range(steps):
        parts = STEP.parts(some_step(draw))
        seconds = math.fsum(scale * part for scale, part in zip(true_scales, parts, strict=True))
        if draw.random() < outliers:
            seconds *= 50
        correction = correction.learned(parts, seconds * draw.uniform(0.98, 1.02))
        correction.check()
    return correction


def test_the_scale_of_each_part_is_found() -> None:
    found = after(Correction(), 2000, (1.2, 0.8, 1.5), outliers=0.0)
    assert found.scales == pytest.approx((1.2, 0.8, 1.5), abs=0.05)
    assert found.mean_error < 0.03


def test_outliers_move_it_little() -> None:
    found = after(Correction(), 2000, (1.0, 1.0, 1.0), outliers=0.02)
    assert found.scales == pytest.approx((1.0, 1.0, 1.0), abs=0.1)
    # They are in the metric all the same: one step in fifty, each counting as 1.
    assert 0.01 < found.mean_error < 0.08


def test_a_change_is_followed_and_the_old_forgotten() -> None:
    limits = CorrectionLimits(memory_steps=200)
    settled = after(Correction(limits=limits), 1000, (1.0, 1.0, 1.0), outliers=0.0)
    changed = after(settled, 2000, (1.5, 1.0, 1.0), outliers=0.0)
    assert changed.scales[0] == pytest.approx(1.5, abs=0.05)
    assert changed.mean_error < 0.03


@given(
    st.lists(st.tuples(ranks, st.floats(allow_nan=True, allow_infinity=True)), max_size=40),
    st.floats(1.5, 1e4),
)
def test_it_stays_within_its_bounds_whatever_is_measured(
    steps: list[tuple[list[int], float]], memory_steps: float
) -> None:
    correction = Correction(limits=CorrectionLimits(memory_steps=memory_steps))
    for widths, seconds in steps:
        parts = STEP.parts(batch(widths))
        correction = correction.learned(parts, seconds)
        correction.check()
        assert 0.5 * math.fsum(parts) <= correction.seconds(parts) * (1 + 1e-9)
        assert correction.seconds(parts) <= 2.0 * math.fsum(parts) * (1 + 1e-9)


@given(widths=ranks, factor=st.floats(1.0, 1e6))
def test_one_step_moves_a_scale_by_no_more_than_the_clip_allows(widths: list[int], factor: float) -> None:
    settled = after(Correction(), 500, (1.0, 1.0, 1.0), outliers=0.0)
    parts = STEP.parts(batch(widths))
    moved = settled.learned(parts, factor * math.fsum(parts))
    before, now = settled.seconds(parts), moved.seconds(parts)
    assert now <= before + settled.limits.clip * max(settled.usual_error, settled.limits.floor) * math.fsum(parts)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_that_is_none_teaches_nothing(seconds: float) -> None:
    assert Correction().learned((1.0, 0.0, 0.0), seconds) == Correction()
    assert Correction().learned((0.0, 0.0, 0.0), 1.0) == Correction()


def test_steps_that_are_all_alike_do_not_wind_it_up() -> None:
    correction = Correction()
    for _ in range(20_000):
        correction = correction.learned((0.01, 0.0, 0.0), 0.01)
    correction.check()
    assert math.fsum(correction.covariance[i][i] for i in range(3)) <= 3 + 1e-9
    assert correction.scales == pytest.approx((1.0, 1.0, 1.0))


def test_bounds_that_hold_nothing_are_refused() -> None:
    for values in ({"memory_steps": 1.0}, {"least": 1.5}, {"most": 0.9}, {"clip": 0.0}, {"floor": 0.0}):
        with pytest.raises(ConfigError):
            CorrectionLimits(**values)


def test_a_profile_learns_of_decodes_and_of_prompts_apart() -> None:
    """Steps that decode alone are half as fast again as measured, steps with prompts twice."""
    draw, correction = random.Random(3), ProfileCorrection()
    for _ in range(800):
        decodes = some_step(draw)
        prompts = StepLoad(tokens=64, context_tokens=2000) if draw.random() < 0.5 else StepLoad()
        slower = 1.9 if prompts.tokens else 1.5
        seconds = slower * PROFILE.step_seconds(decodes, prompts) * draw.uniform(0.99, 1.01)
        correction = correction.learned(PROFILE, decodes, prompts, seconds)
    found = correction.applied_to(PROFILE)
    decodes = some_step(draw)
    assert found.decode_seconds(decodes) == pytest.approx(1.5 * PROFILE.decode_seconds(decodes), rel=0.05)
    load = StepLoad(tokens=64, context_tokens=2000)
    assert found.prefill_seconds(load) == pytest.approx(1.9 * PROFILE.prefill_seconds(load), rel=0.05)
    assert (found.copy, found.cpu, found.layers) == (PROFILE.copy, PROFILE.cpu, PROFILE.layers)
    assert correction.decode.steps + correction.prefill.steps == 800
    assert ProfileCorrection().applied_to(PROFILE) == PROFILE
