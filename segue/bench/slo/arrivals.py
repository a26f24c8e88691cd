"""When requests arrive. Pure: all that is random comes from the generator that is passed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from segue.config import require, require_positive

# Between two points of a ramp the rate is taken to be constant.
_RAMP_POINTS = 4097


class Arrivals(StrEnum):
    """How requests follow each other: evenly, at random, in bursts (gamma-distributed gaps), or as a trace's."""

    CONSTANT = "constant"
    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalsConfig:
    """``burstiness`` is the coefficient of variation of the gaps of gamma arrivals: 1 is Poisson.

    ``ramp`` are the rates before and after the measured time, over their mean; while it is measured the rate changes
    linearly from the one to the other. None is a steady rate.
    """

    kind: str = Arrivals.POISSON.value
    burstiness: float = 1.0
    ramp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self.kind in tuple(Arrivals), "arrivals", f"must be one of {', '.join(Arrivals)}, is {self.kind!r}")
        require_positive(self, "burstiness")
        if self.ramp is not None:
            good = len(self.ramp) == 2 and min(self.ramp) >= 0 and max(self.ramp) > 0
            require(good, "ramp", f"must be two rates that are not negative, and not both 0, is {self.ramp}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """The parts of a run in seconds: requests of the warm-up and of the cool-down are sent and not measured."""

    warmup_seconds: float
    measured_seconds: float
    cooldown_seconds: float

    @property
    def total_seconds(self) -> float:
        return self.warmup_seconds + self.measured_seconds + self.cooldown_seconds

    def measures(self, at_seconds: float) -> bool:
        """Whether a request that is to start then counts."""
        return self.warmup_seconds <= at_seconds < self.warmup_seconds + self.measured_seconds


def unit_gaps(kind: str, burstiness: float, count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """``count`` gaps with a mean of 1: constant, exponential, or gamma of shape burstiness^-2."""
    match kind:
        case Arrivals.CONSTANT:
            return np.ones(count)
        case Arrivals.GAMMA:
            shape = burstiness**-2
            return draw.gamma(shape, 1 / shape, count)
        case Arrivals.POISSON:
            return draw.exponential(1.0, count)
        case _:
            raise ValueError(f"kind: {kind!r} has no gaps to draw")


def arrival_seconds(
    config: ArrivalsConfig,
    requests_per_second: float,
    phases: Phases,
    draw: np.random.Generator,
    recorded: Sequence[float] = (),
) -> NDArray[np.float64]:
    """The arrivals of a run in order, in seconds from its beginning, ``requests_per_second`` in the mean.

    ``recorded`` are a trace's arrivals in seconds, in order, which are stretched to that rate and begin anew where
    they end. Raises ValueError for a trace of fewer than two moments.
    """
    seconds, passed = _expected(config.ramp or (1.0, 1.0), requests_per_second, phases)
    total = float(passed[-1])
    times = _repeated(recorded, total) if config.kind == Arrivals.TRACE else _drawn(config, total, draw)
    found: NDArray[np.float64] = np.interp(times, passed, seconds)
    return found


def _drawn(config: ArrivalsConfig, expected: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """Arrivals at a rate of 1 until ``expected``."""
    parts: list[NDArray[np.float64]] = []
    end = 0.0
    while end < expected:
        times = end + np.cumsum(unit_gaps(config.kind, config.burstiness, max(16, int(expected)), draw))
        parts.append(times)
        end = float(times[-1])
    times = np.concatenate(parts) if parts else np.empty(0)
    return times[times < expected]


def _repeated(recorded: Sequence[float], expected: float) -> NDArray[np.float64]:
    """A trace's arrivals at a mean rate of 1 until ``expected``."""
    times = np.asarray(recorded, dtype=float)
    if len(times) < 2 or times[-1] <= times[0]:
        raise ValueError("recorded: a trace needs requests at two moments at least")
    # The gap from the last to the first of the next round is a mean one.
    unit = (times - times[0]) * (len(times) - 1) / (times[-1] - times[0])
    rounds = itertools.takewhile(lambda start: start < expected, itertools.count(0, len(times)))
    repeated = np.concatenate([unit + start for start in rounds])
    return repeated[repeated < expected]


def _expected(
    ramp: tuple[float, float], requests_per_second: float, phases: Phases
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments of a run, and how many requests are expected by then; the measured time has the wanted mean."""
    first, last = (2 * requests_per_second * rate / sum(ramp) for rate in ramp)
    seconds = np.linspace(0, phases.total_seconds, _RAMP_POINTS)
    begin, end = phases.warmup_seconds, phases.warmup_seconds + phases.measured_seconds
    rates = np.interp(seconds, [begin, end], [first, last])
    steps = np.diff(seconds) * (rates[1:] + rates[:-1]) / 2
    return seconds, np.concatenate([[0.0], np.cumsum(steps)])
