"""The search for the highest rate at which a wanted share of the requests meets its targets. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from segue.bench.slo.config import SearchConfig
from segue.bench.slo.statistics import wilson_interval

# How far below the rate at which it begins a search goes.
_MOST_FALL = 32
NOTHING_SENT = "no request was measured: a longer --duration or a higher rate is needed"


class SearchError(Exception):
    """There is nothing to find. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Of one run: requests that were to be sent in the measured time, and how many of them met their targets."""

    sent: int
    met: int


@dataclass(slots=True, kw_only=True)
class Trial:
    """All that was measured at one rate. ``low`` and ``high`` are Wilson's interval of the share."""

    requests_per_second: float
    confidence: float
    counts: list[Count] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(count.sent for count in self.counts)

    @property
    def met(self) -> int:
        return sum(count.met for count in self.counts)

    @property
    def share(self) -> float:
        return self.met / self.sent

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.met, self.sent, self.confidence)

    def is_sure(self, attain: float) -> bool:
        """Whether the interval lies on one side of the wanted share."""
        low, high = self.interval
        return low >= attain or high < attain


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """``best`` is the highest rate that attained the wanted share, None if none did. ``above`` is the lowest above it
    that did not, None if the highest did. ``is_complete`` says that time was enough to come as near as wanted."""

    best: Trial | None
    above: Trial | None
    is_complete: bool


def find_rate(
    config: SearchConfig,
    measure: Callable[[float, int], Count],
    clock: Callable[[], float],
    trials: list[Trial],
) -> SearchResult:
    """Double the rate until the wanted share is missed, or halve it until it is not; then halve the interval, on a
    scale of factors.

    ``measure`` runs at a rate, and is given a number that differs each time at one rate; what it raises ends the
    search. ``clock`` is in seconds. All that was measured is appended to ``trials``. Raises SearchError if nothing was.
    """
    search = _Search(config, measure, clock, trials)
    low: Trial | None = None
    high: Trial | None = None
    rate = config.from_rate
    while high is None and not search.is_over:
        # A rate that may do is left at that: the next one tells more.
        trial = search.trial(rate, repeats_if_met=rate >= config.to_rate)
        if trial.share < config.attain:
            high = trial
        elif rate < config.to_rate:
            low, rate = trial, min(2 * rate, config.to_rate)
        else:
            low = trial
            break
    while low is None and search.can_tell_less(rate):
        rate /= 2
        trial = search.trial(rate)
        low, high = (trial, high) if trial.share >= config.attain else (None, trial)
    while low and high and not search.is_over and not _is_near(config, low, high):
        trial = search.trial(math.sqrt(low.requests_per_second * high.requests_per_second))
        low, high = (trial, high) if trial.share >= config.attain else (low, trial)
    if low is None:
        is_complete = not search.is_over
    else:
        is_complete = low.requests_per_second >= config.to_rate if high is None else _is_near(config, low, high)
    return SearchResult(best=low, above=high, is_complete=is_complete)


def _is_near(config: SearchConfig, low: Trial, high: Trial) -> bool:
    return high.requests_per_second <= low.requests_per_second * (1 + config.precision)


class _Search:
    """Measures rates until time is over."""

    def __init__(
        self,
        config: SearchConfig,
        measure: Callable[[float, int], Count],
        clock: Callable[[], float],
        trials: list[Trial],
    ) -> None:
        self._config = config
        self._measure = measure
        self._clock = clock
        self._end_seconds = clock() + config.seconds
        self.trials = trials

    @property
    def is_over(self) -> bool:
        return bool(self.trials) and self._clock() >= self._end_seconds

    def can_tell_less(self, rate: float) -> bool:
        """Whether to measure half the rate: of so few requests that a single miss is too many nothing can be told."""
        enough = self.trials[-1].sent / 2 * (1 - self._config.attain) >= 1
        return enough and rate > self._config.from_rate / _MOST_FALL and not self.is_over

    def trial(self, rate: float, *, repeats_if_met: bool = True) -> Trial:
        """Measure a rate, again while the share may lie on either side of the wanted one."""
        trial = Trial(requests_per_second=rate, confidence=self._config.confidence)
        self.trials.append(trial)
        for number in range(self._config.repeats):
            count = self._measure(rate, number)
            if count.sent == 0:
                continue
            trial.counts.append(count)
            is_met = trial.share >= self._config.attain
            if trial.is_sure(self._config.attain) or (is_met and not repeats_if_met) or self.is_over:
                break
        if not trial.counts:
            raise SearchError(NOTHING_SENT)
        return trial
