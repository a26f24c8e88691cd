"""The requests of a simulation, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segue.bench.simulate.config import Targets, WorkloadConfig
from segue.bench.slo.arrivals import unit_gaps
from segue.bench.slo.lengths import lognormal_lengths
from segue.bench.slo.popularity import shares
from segue.scheduler.placement import AdapterCost


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """A request. ``arrival`` is in mean gaps since the beginning: divided by a rate it is in seconds. Without
    ``targets`` it has those of the simulation."""

    number: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    adapter: AdapterCost | None
    tenant: str = ""
    targets: Targets | None = None


def popularity(config: WorkloadConfig) -> NDArray[np.float64]:
    """The share of the requests with an adapter that each adapter receives, the most popular first."""
    return shares(config.popularity, config.exponent, config.adapters)


def draw_requests(config: WorkloadConfig) -> Sequence[SimulatedRequest]:
    """The requests in the order of arrival; the same configuration gives the same ones.

    Arrivals, adapters and lengths are drawn from streams of their own, so that changing one leaves the others.
    """
    arrivals, adapters, prompts, outputs = np.random.default_rng(config.seed).spawn(4)
    times = np.cumsum(unit_gaps(config.arrivals, config.burstiness, config.requests, arrivals))
    places = adapters.choice(config.adapters, size=config.requests, p=popularity(config))
    base = adapters.random(config.requests) < config.base_share
    prompt_tokens = lognormal_lengths(config.prompt_mean, config.prompt_sigma, config.requests, prompts)
    output_tokens = lognormal_lengths(config.output_mean, config.output_sigma, config.requests, outputs)
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
