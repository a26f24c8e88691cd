"""Simulate a workload under each placement, and find the rate at which one of them just meets its targets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segue.bench.report import Percentiles, Report, Row
from segue.bench.simulate.cluster import Cluster
from segue.bench.simulate.config import Placement, SimulationConfig, Targets
from segue.bench.simulate.served import Served, SimulationError
from segue.bench.simulate.workload import SimulatedRequest, draw_requests
from segue.scheduler.placement import FirstFit, MostIdle, PlacementPolicy, RandomReplica, RankAware

ATTAINMENT = "slo_attainment_fraction"
_MOST_DOUBLINGS = 20
_SEARCH_STEPS = 12
_NEAR_ENOUGH = 0.01


def policy_of(name: str, config: SimulationConfig) -> PlacementPolicy:
    """The policy with this name."""
    match Placement(name):
        case Placement.RANK_AWARE:
            counts_from_arrival = math.isfinite(config.targets.time_per_token_seconds)
            return RankAware(
                mean_output_tokens=config.workload.output_mean,
                short_output_tokens=config.workload.short_output_tokens if counts_from_arrival else math.inf,
            )
        case Placement.FIRST_FIT:
            return FirstFit()
        case Placement.MOST_IDLE:
            return MostIdle()
        case Placement.RANDOM:
            return RandomReplica(seed=config.workload.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times of the measured requests, in seconds, and the share of them that met all targets.

    ``tpot_seconds`` leaves out answers of one token, which have no such time.
    """

    ttft_seconds: Sequence[float]
    tpot_seconds: Sequence[float]
    time_per_token_seconds: Sequence[float]
    attainment: float
    preemptions: int


def measure(served: Sequence[Served], targets: Targets, preemptions: int) -> Measured:
    """The times of requests that are done. Raises SimulationError without any."""
    if not served:
        raise SimulationError("no request is measured: simulate more of them, or leave less out")
    ttft, tpot, per_token, met = [], [], [], 0
    for item in served:
        assert item.first_token is not None
        assert item.finished is not None
        ttft.append(item.first_token - item.arrived)
        per_token.append((item.finished - item.arrived) / item.generated)
        later = (item.finished - item.first_token) / (item.generated - 1) if item.generated > 1 else 0.0
        if item.generated > 1:
            tpot.append(later)
        met += (
            ttft[-1] <= targets.ttft_seconds
            and later <= targets.tpot_seconds
            and per_token[-1] <= targets.time_per_token_seconds
        )
    return Measured(
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        time_per_token_seconds=per_token,
        attainment=met / len(served),
        preemptions=preemptions,
    )


def simulate(
    config: SimulationConfig, placement: str, requests: Sequence[SimulatedRequest], requests_per_second: float
) -> Measured:
    """Serve the requests under one placement."""
    cluster = Cluster(config.replica, config.replicas, policy_of(placement, config), config.targets)
    run = cluster.run(requests, requests_per_second)
    first, last = (int(share * len(run.served)) for share in (config.warmup_share, config.cooldown_share))
    return measure(run.served[first:last], config.targets, run.preemptions)


def find_rate(
    config: SimulationConfig,
    placement: str,
    attainment: float,
    requests: Sequence[SimulatedRequest],
    progress: Callable[[str], None] = lambda _: None,
) -> float:
    """The rate, in requests per second, at which the placement attains this share of its targets, by bisection.

    Raises SimulationError where no rate within a factor of a million does.
    """

    def attained(rate: float) -> float:
        progress(f"{placement} at {rate:.4g} requests/s")
        return simulate(config, placement, requests, rate).attainment

    low = high = config.requests_per_second
    here = attained(low)
    for _ in range(_MOST_DOUBLINGS):
        if here >= attainment:
            low, high = high, 2 * high
            here = attained(high)
            if here < attainment:
                break
        else:
            low, high = low / 2, low
            here = attained(low)
            if here >= attainment:
                break
    else:
        raise SimulationError(f"{placement} does not attain {attainment:g} anywhere near {low:g} requests/s")
    for _ in range(_SEARCH_STEPS):
        middle = math.sqrt(low * high)
        here = attained(middle)
        if abs(here - attainment) <= _NEAR_ENOUGH:
            break
        low, high = (middle, high) if here > attainment else (low, middle)
    return middle


def run_simulate_bench(
    config: SimulationConfig,
    progress: Callable[[str], None],
    search: tuple[str, float] | None = None,
) -> Report:
    """The report of all placements on the same requests. ``search`` names a placement and the share it is to attain,
    which sets the rate in place of the configuration's. Raises SimulationError."""
    requests = draw_requests(config.workload)
    if search is not None:
        rate = find_rate(config, *search, requests, progress)
        config = dataclasses.replace(config, requests_per_second=rate)
    rows: list[Row] = []
    for placement in config.placements:
        progress(f"{placement} at {config.requests_per_second:.4g} requests/s")
        rows += placement_rows(placement, simulate(config, placement, requests, config.requests_per_second), config)
    return Report.here("simulate", simulation_settings(config, search), rows)


def placement_rows(placement: str, measured: Measured, config: SimulationConfig) -> Sequence[Row]:
    """Of one placement: the share that met the targets, the times, and preemptions."""
    common: Mapping[str, Any] = {
        "placement": placement,
        "batch": len(measured.ttft_seconds),
        "adapters": config.workload.adapters,
        "ranks": config.workload.ranks,
    }
    share = measured.attainment
    rows = [Row(measure=ATTAINMENT, median=share, p10=share, p90=share, mean=share, runs=1, **common)]
    for name, seconds in (
        ("ttft_ms", measured.ttft_seconds),
        ("tpot_ms", measured.tpot_seconds),
        ("time_per_token_ms", measured.time_per_token_seconds),
    ):
        if seconds:
            times = [1e3 * value for value in seconds]
            middle = dataclasses.asdict(Percentiles.of(times))
            p99 = float(np.percentile(times, 99))
            rows.append(Row(measure=name, mean=float(np.mean(times)), p99=p99, **middle, **common))
    count = float(measured.preemptions)
    rows.append(Row(measure="preemptions_count", median=count, p10=count, p90=count, mean=count, runs=1, **common))
    return rows


def simulation_settings(config: SimulationConfig, search: tuple[str, float] | None = None) -> Mapping[str, Any]:
    """What a report says of the simulation."""
    settings = dataclasses.asdict(config)
    # JSON has no infinity: a target that is none is left out.
    settings["targets"] = {key: value for key, value in settings["targets"].items() if math.isfinite(value)}
    settings["rate_found_for"] = None if search is None else {"placement": search[0], "attainment": search[1]}
    return settings
