"""The search finds the border of a server that is known, and tells what it could not find."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from segue.bench.slo.config import SearchConfig
from segue.bench.slo.search import Count, SearchError, SearchResult, Trial, find_rate

SECONDS = 10.0


@dataclass
class FakeServer:
    """Meets its targets to a share that falls around ``capacity`` requests a second; a run takes ten seconds."""

    capacity: float
    steepness: float = 30.0
    now: float = 0.0
    calls: list[tuple[float, int]] = field(default_factory=list)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    def share(self, rate: float) -> float:
        """0.95 at the capacity."""
        return 1 / (1 + math.exp(self.steepness * math.log(rate / self.capacity) - math.log(19)))

    def measure(self, rate: float, number: int) -> Count:
        self.now += SECONDS
        self.calls.append((rate, number))
        sent = max(1, round(rate * SECONDS))
        return Count(sent=sent, met=int(self.draw.binomial(sent, self.share(rate))))

    def find(self, **config: float) -> tuple[SearchResult, list[Trial]]:
        trials: list[Trial] = []
        settings = SearchConfig(**{"from_rate": 4.0, "seconds": 10_000.0, **config})  # type: ignore[arg-type]
        return find_rate(settings, self.measure, lambda: self.now, trials), trials


@pytest.mark.parametrize("capacity", [5.0, 37.0, 64.0, 300.0])
def test_it_finds_the_border(capacity: float) -> None:
    server = FakeServer(capacity, steepness=60.0)
    result, trials = server.find()
    assert result.best is not None
    assert result.above is not None
    assert result.best.requests_per_second == pytest.approx(capacity, rel=0.08)
    assert result.best.requests_per_second < result.above.requests_per_second
    assert result.above.requests_per_second <= 1.05 * result.best.requests_per_second
    assert result.best.share >= 0.95 > result.above.share
    assert result.is_complete
    assert len({trial.requests_per_second for trial in trials}) == len(trials)


def test_a_border_below_where_it_begins_is_found() -> None:
    result, trials = FakeServer(11.0, steepness=60.0).find(from_rate=64.0)
    assert result.best is not None
    assert result.best.requests_per_second == pytest.approx(11.0, rel=0.15)
    assert [trial.requests_per_second for trial in trials[:4]] == [64, 32, 16, 8]


def test_a_server_that_never_meets_them_has_no_rate() -> None:
    result, trials = FakeServer(1e-6).find(from_rate=512.0)
    assert result.best is None
    assert result.above is not None
    assert result.above.requests_per_second == trials[-1].requests_per_second == 512 / 32
    assert result.is_complete


def test_it_does_not_go_down_to_rates_that_nothing_could_be_told_of() -> None:
    """Of 95% of fewer than twenty requests one miss is too many."""
    _, trials = FakeServer(1e-6).find(from_rate=16.0)
    assert [trial.sent for trial in trials] == [160, 80, 40, 20]


def test_a_server_that_always_meets_them_is_left_at_the_top() -> None:
    result, trials = FakeServer(1e9).find(to_rate=50.0)
    assert [trial.requests_per_second for trial in trials] == [4, 8, 16, 32, 50]
    assert result.best is trials[-1]
    assert result.above is None
    assert result.is_complete


def test_a_share_too_near_to_tell_is_measured_again_and_pooled() -> None:
    server = FakeServer(64.0, steepness=0.01)
    trials: list[Trial] = []
    config = SearchConfig(from_rate=64.0, to_rate=64.0, repeats=5)
    find_rate(config, server.measure, lambda: server.now, trials)
    (trial,) = [trial for trial in trials if trial.requests_per_second == 64.0]
    assert trial.sent == 640 * len(trial.counts)
    assert [number for rate, number in server.calls if rate == 64.0] == list(range(len(trial.counts)))
    assert trial.is_sure(0.95) or len(trial.counts) == 5
    assert len(trial.counts) > 1


def test_a_share_that_is_clear_is_measured_once() -> None:
    server = FakeServer(64.0, steepness=1000.0)
    _, trials = server.find()
    assert all(len(trial.counts) == 1 for trial in trials if not 60 < trial.requests_per_second < 68)


def test_no_run_begins_when_time_is_over() -> None:
    server = FakeServer(50.0, steepness=60.0)
    result, _ = server.find(seconds=5 * SECONDS)
    assert len(server.calls) == 5
    assert not result.is_complete
    assert result.best is not None
    assert result.best.requests_per_second == 32


def test_what_sends_nothing_cannot_be_judged() -> None:
    with pytest.raises(SearchError, match="no request was measured"):
        find_rate(SearchConfig(), lambda _rate, _number: Count(sent=0, met=0), lambda: 0.0, [])


def test_a_run_that_happens_to_send_nothing_is_made_again() -> None:
    counts = [Count(sent=0, met=0), Count(sent=40, met=40)]
    trials: list[Trial] = []
    find_rate(SearchConfig(from_rate=4.0, to_rate=4.0), lambda _rate, number: counts[number], lambda: 0.0, trials)
    assert [trial.sent for trial in trials] == [40]


def test_what_ends_a_run_ends_the_search_and_leaves_what_was_measured() -> None:
    server = FakeServer(64.0)
    trials: list[Trial] = []

    def measure(rate: float, number: int) -> Count:
        if rate > 8:
            raise RuntimeError("void")
        return server.measure(rate, number)

    with pytest.raises(RuntimeError, match="void"):
        find_rate(SearchConfig(from_rate=4.0), measure, lambda: server.now, trials)
    assert [trial.sent for trial in trials] == [40, 80, 0]
