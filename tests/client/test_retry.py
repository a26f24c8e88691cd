"""RetryPolicy, and what Attempts makes of it: no network, no waiting."""

from __future__ import annotations

from typing import Any

import pytest

import segue
from segue import RetryPolicy, SegueError
from segue.client.retry import Attempts
from segue.errors import EngineUnavailableError, OverloadedError
from tests.client.rig import UNAVAILABLE, FakeClock, overloaded

OTHERS = [
    cls
    for cls in (getattr(segue, name) for name in segue.__all__)
    if isinstance(cls, type) and issubclass(cls, SegueError) and cls not in (EngineUnavailableError, OverloadedError)
]


def make(
    policy: RetryPolicy | None = None, *, timeout: float | None = None, drawn: float = 0.0
) -> tuple[Attempts, FakeClock]:
    clock = FakeClock()
    return Attempts(policy or RetryPolicy(), timeout, random=lambda: drawn, clock=clock), clock


def pauses(attempts: Attempts, error: SegueError, count: int) -> list[float]:
    found = []
    for _ in range(count):
        attempts.begin()
        found.append(attempts.pause_seconds(error))
    return found


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"attempts": 0}, "attempts"),
        ({"initial_backoff_seconds": -1.0}, "initial_backoff_seconds"),
        ({"max_backoff_seconds": float("nan")}, "max_backoff_seconds"),
        ({"max_backoff_seconds": float("inf")}, "max_backoff_seconds"),
        ({"multiplier": 0.5}, "multiplier"),
        ({"jitter": 1.5}, "jitter"),
        ({"jitter": float("nan")}, "jitter"),
    ],
)
def test_a_policy_out_of_range_names_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        RetryPolicy(**values)


def test_the_backoff_grows_up_to_its_bound() -> None:
    policy = RetryPolicy(attempts=9, initial_backoff_seconds=1, multiplier=3, max_backoff_seconds=10)
    attempts, _ = make(policy, drawn=0.0)
    assert pauses(attempts, UNAVAILABLE, 5) == [1, 3, 9, 10, 10]


@pytest.mark.parametrize(("jitter", "drawn", "pause"), [(1, 0.0, 8), (1, 0.75, 2), (0.5, 0.5, 6), (0, 0.75, 8)])
def test_jitter_takes_from_the_backoff(jitter: float, drawn: float, pause: float) -> None:
    policy = RetryPolicy(initial_backoff_seconds=8, jitter=jitter)
    attempts, _ = make(policy, drawn=drawn)
    assert pauses(attempts, UNAVAILABLE, 1) == [pause]


@pytest.mark.parametrize("asked", [0.0, 1.5, -3.0])
def test_the_servers_time_comes_on_top(asked: float) -> None:
    policy = RetryPolicy(initial_backoff_seconds=1, max_backoff_seconds=2)
    attempts, _ = make(policy, drawn=0.5)
    assert pauses(attempts, overloaded(asked), 1) == [max(asked, 0.0) + 0.5]


def test_a_server_that_asks_for_too_long_is_not_waited_for() -> None:
    attempts, _ = make(RetryPolicy(initial_backoff_seconds=1, max_backoff_seconds=2))
    attempts.begin()
    with pytest.raises(OverloadedError) as caught:
        attempts.pause_seconds(overloaded(2.1))
    assert caught.value.retry_after_seconds == 2.1


@pytest.mark.parametrize("error", [*(cls("no") for cls in OTHERS), overloaded(None)], ids=lambda error: error.reason)
def test_no_other_error_is_worth_it(error: SegueError) -> None:
    attempts, _ = make()
    attempts.begin()
    with pytest.raises(type(error)) as caught:
        attempts.pause_seconds(error)
    assert caught.value is error


def test_no_more_attempts_than_the_policy_has() -> None:
    attempts, _ = make(RetryPolicy(attempts=3))
    pauses(attempts, UNAVAILABLE, 2)
    attempts.begin()
    with pytest.raises(EngineUnavailableError):
        attempts.pause_seconds(UNAVAILABLE)


def test_what_is_not_repeatable_has_one_attempt() -> None:
    attempts, _ = make()
    attempts.begin()
    with pytest.raises(EngineUnavailableError):
        attempts.pause_seconds(UNAVAILABLE, repeatable=False)


def test_each_attempt_has_the_time_that_is_left() -> None:
    attempts, clock = make(RetryPolicy(attempts=9), timeout=10)
    assert attempts.begin() == 10
    clock.now += 4
    attempts.pause_seconds(UNAVAILABLE)
    assert attempts.begin() == 6
    unbounded, _ = make()
    assert unbounded.begin() is None


def test_the_time_counts_from_the_first_attempt() -> None:
    attempts, clock = make(timeout=10)
    clock.now += 60
    assert attempts.begin() == 10


@pytest.mark.parametrize(("timeout", "follows"), [(2.0, False), (1.0, False), (2.1, True)])
def test_a_pause_ends_before_the_deadline(timeout: float, follows: bool) -> None:
    attempts, _ = make(RetryPolicy(initial_backoff_seconds=2), timeout=timeout)
    attempts.begin()
    if follows:
        assert attempts.pause_seconds(UNAVAILABLE) == 2
    else:
        with pytest.raises(EngineUnavailableError):
            attempts.pause_seconds(UNAVAILABLE)


def test_the_last_error_is_raised_after_oversleeping() -> None:
    attempts, clock = make(RetryPolicy(initial_backoff_seconds=2), timeout=3)
    attempts.begin()
    attempts.pause_seconds(UNAVAILABLE)
    clock.now += 3
    with pytest.raises(EngineUnavailableError) as caught:
        attempts.begin()
    assert caught.value is UNAVAILABLE


def test_an_error_tells_the_one_before() -> None:
    first, second = EngineUnavailableError("first"), EngineUnavailableError("second")
    attempts, _ = make(RetryPolicy(attempts=2))
    attempts.begin()
    attempts.pause_seconds(first)
    attempts.begin()
    with pytest.raises(EngineUnavailableError, match="second") as caught:
        attempts.pause_seconds(second)
    assert caught.value.__cause__ is first
