"""Drawn requests have the distributions that they are said to have."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from segue.bench.simulate.config import WorkloadConfig
from segue.bench.simulate.workload import draw_requests, popularity
from segue.config import ConfigError

BASE = WorkloadConfig(requests=20_000, adapters=8)


@pytest.mark.parametrize(("arrivals", "variation"), [("constant", 0.0), ("poisson", 1.0), ("gamma", 2.5)])
def test_gaps_have_their_mean_and_variation(arrivals: str, variation: float) -> None:
    drawn = draw_requests(dataclasses.replace(BASE, arrivals=arrivals, burstiness=2.5))
    gaps = np.diff([request.arrival for request in drawn])
    assert gaps.mean() == pytest.approx(1.0, abs=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.1)


def test_adapters_are_as_popular_as_their_law_says() -> None:
    shares = popularity(BASE)
    assert shares[0] / shares[3] == pytest.approx(4.0)
    places = [request.adapter.version_id for request in draw_requests(BASE) if request.adapter]
    assert np.bincount(places) / len(places) == pytest.approx(shares, abs=0.02)
    assert popularity(dataclasses.replace(BASE, popularity="uniform")) == pytest.approx([1 / 8] * 8)


def test_azures_functions_are_as_skewed_as_published() -> None:
    shares = popularity(WorkloadConfig(popularity="azure", adapters=40_000))
    assert shares[: int(0.186 * 40_000)].sum() == pytest.approx(0.996, abs=1e-4)
    assert shares[0] == pytest.approx(0.07, abs=0.005)


def test_ranks_go_in_turn_and_lengths_have_their_means() -> None:
    drawn = draw_requests(dataclasses.replace(BASE, prompt_sigma=1.0, output_sigma=0.5, base_share=0.25))
    for request in drawn:
        if request.adapter:
            assert request.adapter.rank == (8, 16, 32, 64)[request.adapter.version_id % 4]
            assert request.adapter.weight_bytes == request.adapter.rank * BASE.rank_bytes
    assert np.mean([request.adapter is None for request in drawn]) == pytest.approx(0.25, abs=0.02)
    assert np.mean([request.prompt_tokens for request in drawn]) == pytest.approx(128, rel=0.05)
    assert np.mean([request.output_tokens for request in drawn]) == pytest.approx(64, rel=0.05)
    assert min(min(request.prompt_tokens, request.output_tokens) for request in drawn) >= 1


def test_one_answer_in_a_hundred_is_short() -> None:
    config = dataclasses.replace(BASE, output_sigma=0.7)
    lengths = [request.output_tokens for request in draw_requests(config)]
    assert np.mean(np.array(lengths) < config.short_output_tokens) == pytest.approx(0.01, abs=0.003)
    assert BASE.short_output_tokens == BASE.output_mean


def test_what_is_not_changed_is_drawn_alike() -> None:
    other = draw_requests(dataclasses.replace(BASE, output_sigma=1.0))
    for before, after in zip(draw_requests(BASE), other, strict=True):
        assert (before.arrival, before.adapter, before.prompt_tokens) == (
            after.arrival,
            after.adapter,
            after.prompt_tokens,
        )
    assert draw_requests(BASE) == draw_requests(BASE)
    assert draw_requests(BASE) != draw_requests(dataclasses.replace(BASE, seed=1))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"arrivals": "often"}, "arrivals: must be one of constant, poisson, gamma, is 'often'"),
        ({"popularity": "some"}, "popularity: must be one of"),
        ({"ranks": ()}, "ranks: must name at least one"),
        ({"base_share": 1.5}, "base_share: must be from 0 to 1"),
        ({"exponent": -1.0}, "exponent: must not be negative"),
        ({"output_sigma": -1.0}, "output_sigma: must not be negative"),
        ({"requests": 0}, "requests: must be greater than 0"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_by_the_field(values: dict[str, object], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        dataclasses.replace(BASE, **values)  # type: ignore[arg-type]
