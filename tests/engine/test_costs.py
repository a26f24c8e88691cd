from __future__ import annotations

import math

import pytest

from segue.engine.costs import EngineCosts
from segue.scheduler.cost_model import CostProfile, StepCoefficients, StepLoad
from segue.scheduler.plan import QueuedRequest, ServiceLevel

MEASURED = CostProfile(
    name="round numbers",
    layers=2,
    decode=StepCoefficients(fixed_seconds=1.0),
    prefill=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.5),
)


def asked(by_seconds: float) -> QueuedRequest:
    level = ServiceLevel(first_token_by_seconds=by_seconds)
    return QueuedRequest(number=1, tokens=8, version_id=None, level=level)


def test_a_measured_profile_is_taken_as_it_is() -> None:
    costs = EngineCosts(layers=2, measured=MEASURED)
    costs.observe(10, 1, 5.0)
    assert costs.profile is MEASURED
    assert costs.start_by(asked(20.0)) == pytest.approx(15.0)
    assert costs.start_by(asked(math.inf)) == math.inf


def test_without_one_both_kinds_of_steps_must_have_been_seen() -> None:
    costs = EngineCosts(layers=2)
    costs.observe(10, 1, 0.5)
    assert costs.profile is None
    assert costs.start_by(asked(20.0)) == 20.0
    costs.observe(3, 3, 0.25)
    profile = costs.profile
    assert profile is not None
    for _ in range(60):
        costs.observe(10, 1, 0.5)
        costs.observe(3, 3, 0.25)
    profile = costs.profile
    assert profile is not None
    assert profile.decode_seconds(StepLoad(tokens=3)) == pytest.approx(0.25)
    assert profile.prefill_seconds(StepLoad(tokens=10)) == pytest.approx(0.5)
    assert costs.start_by(asked(20.0)) == pytest.approx(20.0 - 8 * 0.05)


def test_answers_are_expected_to_be_as_long_as_they_were() -> None:
    costs = EngineCosts(layers=2)
    assert costs.expected_left(10, 100) == 90
    for _ in range(200):
        costs.observe_answer(25, 100)
    assert costs.expected_left(10, 100) == pytest.approx(16, abs=1)
    assert costs.expected_left(60, 100) == 1
