"""Early refusal: what is predicted, and that it never prefers a request that is harder to serve."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.scheduler.cost_model import CopyCoefficients, CostProfile, StepCoefficients
from segue.scheduler.plan import QueuedRequest, ServiceLevel
from segue.scheduler.refusal import LEAST_RETRY_SECONDS, EngineLoad, Refusal, Running, predict, refusal
from tests.scheduler.fakes import LIMITS, admitted, decoding

PROFILE = CostProfile(
    name="round numbers",
    layers=4,
    decode=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.1),
    prefill=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.5),
    copy=CopyCoefficients(seconds_per_byte=1.0),
)
IDLE = EngineLoad(room_pages=100)


def asked(
    tokens: int = 8, *, first_token: float = math.inf, token: float = math.inf, number: int = 99
) -> QueuedRequest:
    level = ServiceLevel(first_token_by_seconds=first_token, token_seconds=token)
    return QueuedRequest(number=number, tokens=tokens, version_id=None, level=level)


def decodes(count: int, tokens_left: int = 10) -> tuple[Running, ...]:
    return tuple(
        Running(request=decoding(number, tokens=5, pages=2), tokens_left=tokens_left + number)
        for number in range(count)
    )


def refused(request: QueuedRequest, load: EngineLoad = IDLE, now: float = 0.0, copy_bytes: int = 0) -> Refusal | None:
    return refusal(request, load, PROFILE, LIMITS, now=now, arrival_seconds=0.0, copy_bytes=copy_bytes)


def test_an_idle_engine_takes_its_prefill_and_the_copy() -> None:
    found = predict(asked(8), IDLE, PROFILE, LIMITS, copy_bytes=3)
    assert found.first_token_seconds == pytest.approx(1.0 + 8 * 0.5 + 3.0)
    assert found.token_seconds == pytest.approx(1.1)
    # 20 rows are two steps of at most 16.
    assert predict(asked(20), IDLE, PROFILE, LIMITS).first_token_seconds == pytest.approx(2.0 + 10.0)


def test_prompts_ride_in_chunks_with_those_that_decode() -> None:
    found = predict(asked(8), EngineLoad(running=decodes(2), room_pages=100), PROFILE, LIMITS)
    # Two chunks of at most 6, each with a step of two decodes.
    assert found.first_token_seconds == pytest.approx(2 * 1.2 + 8 * 0.5)
    assert found.token_seconds == pytest.approx(1.3)


def test_what_is_before_it_counts() -> None:
    prefilling = Running(request=admitted(1, 12, pages=4, computed_tokens=4), tokens_left=5)
    load = EngineLoad(running=(prefilling,), before=(asked(4, number=2),), room_pages=100)
    found = predict(asked(8), load, PROFILE, LIMITS)
    assert found.first_token_seconds == pytest.approx(4 * 1.1 + (8 + 4 + 8) * 0.5)


def test_without_a_place_or_pages_it_waits_for_the_answers_that_end_first() -> None:
    full = EngineLoad(running=decodes(LIMITS.max_running), room_pages=100)
    free = EngineLoad(running=decodes(LIMITS.max_running - 1), room_pages=100)
    assert predict(asked(1), full, PROFILE, LIMITS).first_token_seconds == pytest.approx(10 * 1.8 + 1.8 + 0.5)
    assert predict(asked(1), free, PROFILE, LIMITS).first_token_seconds == pytest.approx(1.7 + 0.5)
    # Three pages are wanted and none is free; each of those that end gives two.
    short = EngineLoad(running=decodes(3), room_pages=0)
    assert predict(asked(5), short, PROFILE, LIMITS).first_token_seconds == pytest.approx(11 * 1.3 + 1.3 + 2.5)


def test_a_target_that_an_idle_engine_misses_is_refused_for_good() -> None:
    for request in (asked(first_token=4.9), asked(token=1.0)):
        found = refused(request)
        assert found is not None
        assert found.retry_after_seconds is None
        assert "idle" in found.message
    assert refused(asked(first_token=5.1, token=1.2)) is None


def test_a_target_that_is_missed_now_is_refused_until_it_could_be_met() -> None:
    load = EngineLoad(running=decodes(2), room_pages=100)
    found = refused(asked(first_token=6.0), load)
    assert found is not None
    assert found.retry_after_seconds == pytest.approx(0.4)
    assert refused(asked(first_token=6.5), load) is None
    # A token takes 1.3 beside the two, of which the first ends in ten.
    found = refused(asked(token=1.25), load)
    assert found is not None
    assert found.retry_after_seconds == pytest.approx(13.0)


def test_time_that_has_passed_and_weights_that_are_to_come_count() -> None:
    assert refused(asked(first_token=6.0), now=0.9) is None
    found = refused(asked(first_token=6.0), now=1.05)
    assert found is not None
    assert found.retry_after_seconds == LEAST_RETRY_SECONDS
    assert refused(asked(first_token=6.0), copy_bytes=2) is not None


_targets = st.sampled_from([math.inf, 1.2, 2.0, 6.0, 12.0, 40.0])
_loads = st.builds(
    EngineLoad,
    running=st.integers(0, LIMITS.max_running).map(decodes),
    before=st.lists(st.integers(1, 30), max_size=4).map(lambda sizes: tuple(asked(tokens) for tokens in sizes)),
    room_pages=st.integers(0, 30),
)


@given(
    load=_loads,
    tokens=st.tuples(st.integers(1, 40), st.integers(0, 20)),
    first=st.tuples(_targets, st.floats(0, 5)),
    token=st.tuples(_targets, st.floats(0, 1)),
    now=st.floats(0, 5),
)
def test_who_is_easier_to_serve_is_never_refused_where_the_harder_is_taken(
    load: EngineLoad,
    tokens: tuple[int, int],
    first: tuple[float, float],
    token: tuple[float, float],
    now: float,
) -> None:
    hard = asked(sum(tokens), first_token=first[0], token=token[0])
    easy = asked(tokens[0], first_token=sum(first), token=sum(token))
    if refused(hard, load, now) is None:
        assert refused(easy, load, now) is None
    lighter = dataclasses.replace(load, before=load.before[1:])
    if refused(hard, load, now) is None:
        assert refused(hard, lighter, now) is None


@given(load=_loads, tokens=st.integers(1, 40), first=_targets, token=_targets, now=st.floats(0, 5))
def test_a_request_is_refused_exactly_when_its_prediction_misses(
    load: EngineLoad, tokens: int, first: float, token: float, now: float
) -> None:
    request = asked(tokens, first_token=first, token=token)
    found = predict(request, load, PROFILE, LIMITS)
    idle = predict(request, IDLE, PROFILE, LIMITS)
    feasible = now + found.first_token_seconds <= first and found.token_seconds <= token
    answer = refused(request, load, now)
    assert (answer is None) == (feasible and idle.first_token_seconds <= first and idle.token_seconds <= token)
    if answer is not None and answer.retry_after_seconds is None:
        assert idle.first_token_seconds > first or idle.token_seconds > token
