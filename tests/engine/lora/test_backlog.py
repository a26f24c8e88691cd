"""When copies will be through, by what is ahead of them on the link."""

from __future__ import annotations

import pytest
import torch

from segue.engine.lora.backlog import CopyBacklog
from segue.engine.lora.landing import LandingPlace
from segue.engine.lora.states import DeviceCopy
from segue.engine.rate import RateMeter


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def load() -> DeviceCopy:
    place = LandingPlace(page_table=torch.zeros(0, dtype=torch.int64), tables=(), behind=None)
    return DeviceCopy.to_fill((), place, 3)


def test_a_layer_is_through_behind_all_that_were_put_before_it() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    first, second = load(), load()
    assert backlog.busy_seconds() == 0
    for item, size in ((first, 20), (second, 30), (first, 50)):
        backlog.put(item, size)
    assert backlog.landing_seconds(first) == pytest.approx([2, 10])
    assert backlog.landing_seconds(second) == pytest.approx([5])
    assert backlog.busy_seconds() == pytest.approx(10)
    assert backlog.loads == 2
    clock.now += 1
    assert backlog.landing_seconds(second) == pytest.approx([4])
    clock.now += 1.5
    backlog.end(first, 20, clock.now)
    assert backlog.landing_seconds(first) == pytest.approx([8])
    assert backlog.landing_seconds(second) == pytest.approx([3])
    backlog.check()
    backlog.end(second, 30, clock.now)
    backlog.end(first, 50, clock.now)
    assert (backlog.busy_seconds(), backlog.loads) == (0, 0)
    assert list(backlog.landing_seconds(first)) == []
    backlog.check()


def test_what_is_late_has_not_come() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    item = load()
    backlog.put(item, 20)
    clock.now += 50
    (seconds,) = backlog.landing_seconds(item)
    assert 0 < seconds < 1e-3


def test_a_link_that_was_idle_begins_anew() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    item = load()
    backlog.put(item, 20)
    backlog.end(item, 20, clock.now)
    clock.now += 50
    backlog.put(item, 20)
    assert backlog.landing_seconds(item) == pytest.approx([2])


def test_one_odd_measurement_moves_a_rate_within_bounds() -> None:
    rates = []
    for seconds in (1e-9, 1e9):
        rate = RateMeter(100.0)
        rate.observe(100, seconds)
        rates.append(100 / rate.seconds_for(100))
    assert 150 < rates[0] < 200
    assert 75 < rates[1] < 100
