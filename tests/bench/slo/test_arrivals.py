"""Arrivals have the rates and the spreads that they are said to have, and come from the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from segue.bench.slo.arrivals import ArrivalsConfig, Phases, arrival_seconds
from segue.config import ConfigError

PHASES = Phases(warmup_seconds=100.0, measured_seconds=1800.0, cooldown_seconds=100.0)


def arrivals(rate: float = 10.0, phases: Phases = PHASES, **config: object) -> np.ndarray:
    return arrival_seconds(ArrivalsConfig(**config), rate, phases, np.random.default_rng(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "variation"),
    [
        ({"kind": "constant"}, 0.0),
        ({"kind": "poisson"}, 1.0),
        ({"kind": "gamma", "burstiness": 0.5}, 0.5),
        ({"kind": "gamma", "burstiness": 3.0}, 3.0),
    ],
)
def test_gaps_have_their_mean_and_their_variation(config: dict[str, object], variation: float) -> None:
    times = arrivals(**config)  # type: ignore[arg-type]
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.mean() == pytest.approx(0.1, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.1)
    assert list(times) == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 2000


def test_poisson_gaps_are_exponential() -> None:
    """By Kolmogorov and Smirnov: the bound is that of one wrong alarm in a thousand seeds."""
    gaps = np.sort(np.diff(arrivals())) * 10
    expected = 1 - np.exp(-gaps)
    places = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(places - expected).max() < 1.95 / np.sqrt(len(gaps))


def test_poisson_counts_are_as_spread_as_their_mean() -> None:
    counts = np.histogram(arrivals(), bins=np.arange(0, 2001))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)


def test_the_same_seed_gives_the_same_arrivals_at_another_rate_faster() -> None:
    assert list(arrivals()) == list(arrivals())
    slow, fast = arrivals(rate=10.0), arrivals(rate=20.0)
    assert fast[: len(slow) // 2] == pytest.approx(slow[: len(slow) // 2] / 2, rel=1e-3)


def test_a_ramp_rises_over_what_is_measured_and_keeps_its_mean() -> None:
    times = arrivals(rate=20.0, kind="constant", ramp=(0.5, 1.5))
    counts = [
        ((begin <= times) & (times < end)).sum() for begin, end in [(0, 100), (100, 550), (1450, 1900), (1900, 2000)]
    ]
    assert counts == pytest.approx([1000, 450 * 12.5, 450 * 27.5, 3000], rel=0.01)
    measured = ((times >= 100) & (times < 1900)).sum()
    assert measured == pytest.approx(20 * 1800, rel=0.01)


def test_a_ramp_from_nothing_sends_nothing_before() -> None:
    times = arrivals(kind="poisson", ramp=(0.0, 1.0))
    assert times[0] > 100


def test_a_trace_keeps_its_pattern_and_begins_anew() -> None:
    config = ArrivalsConfig(kind="trace")
    phases = Phases(warmup_seconds=0.0, measured_seconds=5.0, cooldown_seconds=0.0)
    recorded = (50.0, 51.0, 51.0, 56.0)
    times = arrival_seconds(config, 2.0, phases, np.random.default_rng(0), recorded)
    # Three gaps of six seconds in all become gaps of half a second in the mean.
    assert times == pytest.approx([0.0, 0.25, 0.25, 1.5, 2.0, 2.25, 2.25, 3.5, 4.0, 4.25, 4.25], abs=1e-9)


@pytest.mark.parametrize("recorded", [(), (1.0,), (2.0, 2.0)])
def test_a_trace_of_one_moment_has_no_rate(recorded: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two moments"):
        arrival_seconds(ArrivalsConfig(kind="trace"), 1.0, PHASES, np.random.default_rng(0), recorded)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "bursty"}, "arrivals: must be one of constant, poisson, gamma, trace, is 'bursty'"),
        ({"burstiness": 0.0}, "burstiness: must be greater than 0"),
        ({"ramp": (-1.0, 1.0)}, "ramp: must be two rates"),
        ({"ramp": (0.0, 0.0)}, "ramp: must be two rates"),
    ],
)
def test_what_cannot_be_is_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ArrivalsConfig(**config)  # type: ignore[arg-type]


def test_phases_are_half_open() -> None:
    phases = Phases(warmup_seconds=1.0, measured_seconds=2.0, cooldown_seconds=0.5)
    assert [phases.measures(at) for at in (0.0, 0.999, 1.0, 2.999, 3.0)] == [False, False, True, True, False]
    assert phases.total_seconds == 3.5
