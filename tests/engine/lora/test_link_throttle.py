from __future__ import annotations

import threading

import pytest

from segue.engine.lora.link_throttle import LinkThrottle
from segue.engine.rate import RateMeter


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_transfers_go_through_one_after_the_other() -> None:
    clock = FakeClock()
    link = LinkThrottle(1000.0, clock)
    assert link.book(500) == pytest.approx(100.5)
    assert link.book(250) == pytest.approx(100.75)
    clock.seconds = 103.0
    assert link.book(1000) == pytest.approx(104.0)


def test_an_idle_link_saves_nothing_up() -> None:
    clock = FakeClock()
    link = LinkThrottle(1000.0, clock)
    clock.seconds = 200.0
    assert link.book(1000) == pytest.approx(201.0)


def test_a_link_without_bound_never_waits() -> None:
    link = LinkThrottle(None, FakeClock())
    link.book(1 << 50)
    assert link.book(1 << 50) == 100.0


def test_another_bandwidth_forgets_what_was_booked() -> None:
    clock = FakeClock()
    link = LinkThrottle(1.0, clock)
    link.book(1000)
    link.book_rows(1000)
    link.throttle(500.0)
    assert link.book(1000) == pytest.approx(102.0)
    link.throttle(500.0)
    assert link.book_rows(1000) == pytest.approx(102.0)
    link.throttle(None)
    assert link.book(1 << 50) == 100.0
    with pytest.raises(ValueError, match="bytes_per_second: must be greater than 0, is -1"):
        link.throttle(-1)


def test_waiting_ends_at_the_time_or_when_stopped() -> None:
    link = LinkThrottle(1000.0)
    link.wait_until(link.book(5), threading.Event())
    stopped = threading.Event()
    threading.Timer(0.01, stopped.set).start()
    link.wait_until(link.book(1 << 40), stopped)
    assert stopped.is_set()


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(ValueError, match="bytes_per_second"):
        LinkThrottle(0.0)


def test_a_measured_rate_follows_what_is_observed() -> None:
    rate = RateMeter(1e9)
    for _ in range(80):
        rate.observe(1000, 0.5)
    assert rate.seconds_for(4000) == pytest.approx(2.0, rel=0.01)
    rate.observe(0, 1.0)
    rate.observe(10, 0.0)
    assert rate.seconds_for(4000) == pytest.approx(2.0, rel=0.01)


def test_rows_go_ahead_of_a_copy_at_half_the_rate_and_push_later_copies_back() -> None:
    link = LinkThrottle(1000.0, FakeClock())
    assert link.book(5000) == pytest.approx(105.0)
    assert link.book_rows(1000) == pytest.approx(102.0)
    assert link.book_rows(500) == pytest.approx(103.0)
    assert link.book(1000) == pytest.approx(107.5)


def test_rows_on_an_idle_link_have_all_of_it() -> None:
    clock = FakeClock()
    link = LinkThrottle(1000.0, clock)
    assert link.book_rows(1000) == pytest.approx(101.0)
    clock.seconds = 103.0
    assert link.book_rows(1000) == pytest.approx(104.0)
