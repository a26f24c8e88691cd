"""What the policy does to whole runs: a tenant's flood, and requests with targets of several kinds.

An 8B model's figures, rounded, stand for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from segue.bench.simulate.cluster import Cluster
from segue.bench.simulate.config import ReplicaConfig, Targets
from segue.bench.simulate.served import Served
from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.cost_model import CostProfile, StepCoefficients
from segue.scheduler.placement import MostIdle
from segue.scheduler.plan import SchedulerLimits
from segue.scheduler.policy import PolicyName

PROFILE = CostProfile(
    name="8B",
    layers=32,
    decode=StepCoefficients(fixed_seconds=4.4e-3, seconds_per_token=5e-6, seconds_per_context_token=34e-9),
    prefill=StepCoefficients(fixed_seconds=4.4e-3, seconds_per_token=28e-6, seconds_per_context_token=1e-9),
)
TENANTS, FLOOD = 8, "0"
CLASSES = (
    Targets(ttft_seconds=0.1, tpot_seconds=0.02),
    Targets(ttft_seconds=0.2, tpot_seconds=0.03),
    Targets(ttft_seconds=2.0, tpot_seconds=0.1),
)


def serve(
    requests: Sequence[SimulatedRequest], policy: PolicyName, *, chunk_tokens: int = 128, running: int = 128
) -> Sequence[Served]:
    limits = SchedulerLimits(
        page_tokens=16,
        max_running=running,
        max_passes=16,
        budget_tokens=512,
        chunk_tokens=chunk_tokens,
        layers_per_step=2,
    )
    config = ReplicaConfig(profile=PROFILE, limits=limits, pages=30_000, page_bytes=2 << 20, policy=policy.value)
    return Cluster(config, 1, MostIdle(), Targets()).run(requests, requests_per_second=1.0).served


def arrivals(rate: float, seconds: float, seed: Sequence[int]) -> Iterator[tuple[float, int, int]]:
    """Times of arrival, tokens of a prompt around 128, and of an answer around 64."""
    draw = np.random.default_rng(seed)
    at = float(draw.exponential(1 / rate))
    while at < seconds:
        yield at, 1 + int(draw.lognormal(math.log(115), 0.5)), 1 + int(draw.lognormal(math.log(56), 0.5))
        at += float(draw.exponential(1 / rate))


def flooded(times_its_share: int, rate: float = 90.0, seconds: float = 10.0) -> list[SimulatedRequest]:
    """Tenants that share a rate alike, of which one sends so many times its share. The others send the same."""
    drawn = [
        (*one, str(tenant))
        for tenant in range(TENANTS)
        for part in range(times_its_share if str(tenant) == FLOOD else 1)
        for one in arrivals(rate / TENANTS, seconds, (tenant, part))
    ]
    return [
        SimulatedRequest(
            number=number, arrival=at, prompt_tokens=prompt, output_tokens=output, adapter=None, tenant=tenant
        )
        for number, (at, prompt, output, tenant) in enumerate(sorted(drawn))
    ]


def p99_of_others(served: Sequence[Served]) -> tuple[float, float]:
    """Of the time to the first token, and per token after it."""
    ttft, tpot = [], []
    for item in served:
        assert item.first_token is not None
        assert item.finished is not None
        if item.request.tenant != FLOOD:
            ttft.append(item.first_token - item.arrived)
            if item.generated > 1:
                tpot.append((item.finished - item.first_token) / (item.generated - 1))
    return float(np.percentile(ttft, 99)), float(np.percentile(tpot, 99))


@pytest.mark.parametrize(("running", "rate"), [(128, 90.0), (64, 90.0), (128, 60.0), (64, 60.0), (128, 30.0)])
def test_a_flood_of_one_tenant_hardly_moves_the_others(running: int, rate: float) -> None:
    """At a load that the replica just bears, and below, where others would notice every row: ten times its share from
    one tenant."""
    alike = p99_of_others(serve(flooded(1, rate), PolicyName.SLO, running=running))
    moved = p99_of_others(serve(flooded(10, rate), PolicyName.SLO, running=running))
    assert moved[0] <= 1.15 * alike[0]
    assert moved[1] <= 1.15 * alike[1]


def test_first_come_first_served_lets_the_flood_through() -> None:
    alike, moved = (p99_of_others(serve(flooded(times), PolicyName.FCFS)) for times in (1, 10))
    assert moved[0] > 5 * alike[0]


def attained(policy: PolicyName, rate: float, chunk_tokens: int) -> float:
    """The share of requests of three classes that meet all their targets."""
    requests = [
        SimulatedRequest(
            number=number,
            arrival=at,
            prompt_tokens=4 * prompt,
            output_tokens=2 * output,
            adapter=None,
            targets=CLASSES[number % 3],
        )
        for number, (at, prompt, output) in enumerate(arrivals(rate, 600 / rate, (7,)))
    ]
    met = 0
    for item in serve(requests, policy, chunk_tokens=chunk_tokens):
        targets = item.request.targets
        assert targets is not None
        assert item.first_token is not None
        assert item.finished is not None
        tpot = (item.finished - item.first_token) / max(1, item.generated - 1)
        met += item.first_token - item.arrived <= targets.ttft_seconds and tpot <= targets.tpot_seconds
    return met / len(requests)


def test_targets_are_met_where_first_come_first_served_misses_them_with_any_chunk() -> None:
    assert attained(PolicyName.SLO, 38.0, 128) >= 0.95
    assert all(attained(PolicyName.FCFS, 38.0, chunk) < 0.95 for chunk in (64, 128, 256, 512))
