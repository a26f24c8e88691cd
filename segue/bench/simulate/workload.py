"""The requests of a simulation, drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segue.bench.simulate.config import Arrivals, Popularity, WorkloadConfig
from segue.scheduler.placement import AdapterCost

# Of the applications on Azure Functions the 18.6% most popular receive 99.6% of the invocations (Shahrad et al.,
# "Serverless in the Wild", USENIX ATC 2020). That is one condition on two parameters of (k + shift)^-exponent: with
# this shift the first of 40,000 receives 7% and the first ten 41%, and the exponent follows. A pure power law (shift 0,
# exponent 1.53) would give the first one 40%.
AZURE_SHIFT, AZURE_EXPONENT = 10.0, 1.795


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """A request. ``arrival`` is in mean gaps since the beginning: divided by a rate it is in seconds."""

    number: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    adapter: AdapterCost | None


def popularity(config: WorkloadConfig) -> NDArray[np.float64]:
    """The share of the requests with an adapter that each adapter receives, the most popular first."""
    places = np.arange(1, config.adapters + 1, dtype=float)
    match config.popularity:
        case Popularity.UNIFORM:
            weights = np.ones(config.adapters)
        case Popularity.AZURE:
            weights = (places + AZURE_SHIFT) ** -AZURE_EXPONENT
        case _:
            weights = places**-config.exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def draw_requests(config: WorkloadConfig) -> Sequence[SimulatedRequest]:
    """The requests in the order of arrival; the same configuration gives the same ones.

    Arrivals, adapters and lengths are drawn from streams of their own, so that changing one leaves the others.
    """
    arrivals, adapters, prompts, outputs = np.random.default_rng(config.seed).spawn(4)
    times = np.cumsum(_gaps(config, arrivals))
    places = adapters.choice(config.adapters, size=config.requests, p=popularity(config))
    base = adapters.random(config.requests) < config.base_share
    prompt_tokens = _lengths(config.prompt_mean, config.prompt_sigma, config.requests, prompts)
    output_tokens = _lengths(config.output_mean, config.output_sigma, config.requests, outputs)
    costs = {place: adapter_cost(config, place) for place in set(places.tolist())}
    return [
        SimulatedRequest(
            number=number,
            arrival=float(times[number]),
            prompt_tokens=int(prompt_tokens[number]),
            output_tokens=int(output_tokens[number]),
            adapter=None if base[number] else costs[int(places[number])],
        )
        for number in range(config.requests)
    ]


def adapter_cost(config: WorkloadConfig, place: int) -> AdapterCost:
    """The adapter at a place in the order of popularity."""
    rank = config.ranks[place % len(config.ranks)]
    return AdapterCost(version_id=place, rank=rank, weight_bytes=rank * config.rank_bytes)


def _gaps(config: WorkloadConfig, draw: np.random.Generator) -> NDArray[np.float64]:
    """Gaps with a mean of 1."""
    match config.arrivals:
        case Arrivals.CONSTANT:
            return np.ones(config.requests)
        case Arrivals.GAMMA:
            shape = config.burstiness**-2
            return draw.gamma(shape, 1 / shape, config.requests)
        case _:
            return draw.exponential(1.0, config.requests)


def _lengths(mean: float, sigma: float, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    lengths = draw.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.maximum(np.rint(lengths), 1).astype(np.int64)
