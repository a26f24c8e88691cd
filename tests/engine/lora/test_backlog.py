"""When copies will be through, by what is ahead of them on the link."""

from __future__ import annotations

import math

import pytest
import torch

from segue.engine.lora.backlog import CopyBacklog
from segue.engine.lora.landing import LandingPlace
from segue.engine.lora.transfer import CopyLoad
from segue.engine.rate import RateMeter


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def load(arrival: int = 0, need: float = 1) -> CopyLoad:
    """One that a pass waits for, unless another ``need`` is given."""
    place = LandingPlace(
        page_table=torch.zeros(0, dtype=torch.int64), rows=torch.zeros(0, 8, dtype=torch.int64), starts=(), behind=None
    )
    return CopyLoad(layers=(), place=place, arrival=arrival, need=need)


def test_loads_share_the_link_layer_by_layer() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    first, second = load(), load()
    assert backlog.busy_seconds() == 0
    for item, size in ((first, 20), (first, 20), (first, 50), (second, 30), (second, 10)):
        backlog.put(item, [size])
    # The other's layers count as their mean: 20 bytes of the second load, 30 of the first.
    assert backlog.landing_seconds(first) == pytest.approx([4, 8, 13])
    assert backlog.landing_seconds(second) == pytest.approx([6, 10])
    assert backlog.busy_seconds() == pytest.approx(13)
    assert backlog.loads == 2
    clock.now += 1
    assert backlog.landing_seconds(second) == pytest.approx([5, 9])
    backlog.end(first, 1, clock.now)
    assert backlog.landing_seconds(first) == pytest.approx([4, 11])
    backlog.check()
    for item in (second, first, second, first):
        backlog.end(item, 1, clock.now)
        backlog.check()
    assert (backlog.busy_seconds(), backlog.loads) == (0, 0)
    assert list(backlog.landing_seconds(first)) == []


def test_the_last_layers_have_the_link_to_themselves() -> None:
    backlog = CopyBacklog(RateMeter(10.0), FakeClock())
    long, short = load(), load()
    for size in (10, 10, 10, 10):
        backlog.put(long, [size])
    backlog.put(short, [10])
    assert backlog.landing_seconds(long) == pytest.approx([2, 3, 4, 5])
    assert backlog.landing_seconds(short) == pytest.approx([2])


def test_what_is_late_has_not_come() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    item = load()
    backlog.put(item, [20])
    clock.now += 50
    (seconds,) = backlog.landing_seconds(item)
    assert 0 < seconds < 1e-3


def test_a_link_that_was_idle_begins_anew() -> None:
    clock = FakeClock()
    backlog = CopyBacklog(RateMeter(10.0), clock)
    item = load()
    backlog.put(item, [20])
    backlog.end(item, 1, clock.now)
    clock.now += 50
    backlog.put(item, [20])
    assert backlog.landing_seconds(item) == pytest.approx([2])


def test_one_odd_measurement_moves_a_rate_within_bounds() -> None:
    rates = []
    for seconds in (1e-9, 1e9):
        rate = RateMeter(100.0)
        rate.observe(100, seconds)
        rates.append(100 / rate.seconds_for(100))
    assert 150 < rates[0] < 200
    assert 75 < rates[1] < 100


def test_loads_of_earlier_passes_come_first_and_those_of_none_one_after_the_other() -> None:
    backlog = CopyBacklog(RateMeter(10.0), FakeClock())
    earlier, later = load(need=1), load(need=2)
    first, second = load(1, math.inf), load(2, math.inf)
    for item in (second, first, later, earlier):
        backlog.put(item, [10])
        backlog.put(item, [10])
    assert backlog.landing_seconds(earlier) == pytest.approx([1, 2])
    assert backlog.landing_seconds(later) == pytest.approx([3, 4])
    assert backlog.landing_seconds(first) == pytest.approx([5, 6])
    assert backlog.landing_seconds(second) == pytest.approx([7, 8])
    # What the device has cannot be overtaken.
    backlog.enqueue(second, 10)
    assert backlog.landing_seconds(earlier) == pytest.approx([2, 3])
    backlog.check()
    backlog.end(second, 1, 100.0)
    assert backlog.landing_seconds(earlier) == pytest.approx([1, 2])
    backlog.check()
