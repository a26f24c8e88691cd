"""Adapters are as popular as they are said to be, and ordered by rank as they are said to be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from segue.bench.slo.popularity import PopularityConfig, draw_places, order_by_popularity, shares
from segue.config import ConfigError


def drawn(
    config: PopularityConfig, adapters: int, count: int = 20_000, counts: tuple[int, ...] = ()
) -> list[int | None]:
    weights = shares(config.kind, config.parameter, adapters, counts)
    return draw_places(config, weights, count, np.random.default_rng(7))


@pytest.mark.parametrize("kind", ["uniform", "zipf", "geometric", "azure", "one"])
def test_requests_are_spread_as_the_shares_say(kind: str) -> None:
    config = PopularityConfig(kind=kind, parameter=0.5)
    weights = shares(kind, 0.5, 12)
    places = [place for place in drawn(config, 12) if place is not None]
    assert np.bincount(places, minlength=12) / len(places) == pytest.approx(weights, abs=0.012)
    assert weights.sum() == pytest.approx(1.0)
    assert list(weights) == sorted(weights, reverse=True)


def test_shares_follow_their_laws() -> None:
    zipf = shares("zipf", 1.2, 8)
    assert zipf[0] / zipf[3] == pytest.approx(4**1.2)
    geometric = shares("geometric", 0.25, 8)
    assert geometric[5] / geometric[4] == pytest.approx(0.75)
    assert list(shares("one", 1.0, 3)) == [1, 0, 0]


def test_distinct_requests_take_the_adapters_in_turn() -> None:
    places = drawn(PopularityConfig(kind="distinct", base_share=0.3), 5, 1000)
    used = [place for place in places if place is not None]
    assert all((after - before) % 5 == 1 for before, after in pairwise(used))
    assert places.count(None) / 1000 == pytest.approx(0.3, abs=0.05)


def test_a_trace_gives_its_most_used_functions() -> None:
    assert list(shares("trace", 1.0, 2, (1, 5, 15))) == [0.75, 0.25]
    assert list(shares("trace", 1.0, 4, (5, 15))) == [0.75, 0.25, 0, 0]


def test_ranks_come_in_turn() -> None:
    ranks = [16, 16, 16, 8, 8, 32]
    assert [ranks[place] for place in order_by_popularity(ranks, None, np.random.default_rng(0))] == [
        8,
        16,
        32,
        8,
        16,
        16,
    ]


@pytest.mark.parametrize(("correlation", "expected"), [(1.0, 1.0), (-1.0, -1.0), (0.0, 0.0), (0.6, 0.6), (-0.6, -0.6)])
def test_popular_adapters_have_ranks_to_that_correlation(correlation: float, expected: float) -> None:
    ranks = list(range(1, 2001))
    order = order_by_popularity(ranks, correlation, np.random.default_rng(5))
    assert sorted(order) == list(range(2000))
    found = np.corrcoef(np.arange(2000), [-ranks[place] for place in order])[0, 1]
    # Spearman's correlation of normal pairs is (6 / pi) asin(r / 2).
    assert found == pytest.approx(6 / np.pi * np.arcsin(expected / 2), abs=0.04)


@pytest.mark.parametrize(
    ("text", "kind", "parameter"),
    [("zipf", "zipf", 1.0), ("zipf:0.7", "zipf", 0.7), ("geometric:0.2", "geometric", 0.2), ("one", "one", 1.0)],
)
def test_a_kind_has_its_number(text: str, kind: str, parameter: float) -> None:
    assert PopularityConfig.parse_kind(text) == (kind, parameter)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pareto", "popularity: must be one of uniform, zipf, "),
        ("zipf:x", "popularity: 'x' is no number"),
        ("uniform:2", "popularity: uniform takes no number, is 'uniform:2'"),
    ],
)
def test_an_unknown_kind_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PopularityConfig.parse_kind(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "geometric", "parameter": 1.0}, "popularity: geometric: must be above 0 and below 1"),
        ({"parameter": -1.0}, "popularity: zipf: must not be negative"),
        ({"base_share": 1.1}, "base_share: must be from 0 to 1"),
        ({"rank_correlation": 2.0}, "rank_correlation: must be from -1 to 1"),
    ],
)
def test_what_cannot_be_is_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PopularityConfig(**config)  # type: ignore[arg-type]
