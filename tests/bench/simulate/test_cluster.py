"""The simulated cluster: times that can be worked out by hand, and invariants under any load."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.bench.simulate.cluster import Cluster, ClusterRun
from segue.bench.simulate.config import ReplicaConfig, Targets
from segue.bench.simulate.profiles import CARASERVE_MBGMV
from segue.bench.simulate.served import SimulationError
from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, StepCoefficients
from segue.scheduler.placement import AdapterCost, FirstFit, MostIdle, PlacementPolicy, RandomReplica, RankAware
from segue.scheduler.plan import SchedulerLimits

PROFILE = CostProfile(
    name="round numbers",
    layers=4,
    decode=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.1),
    prefill=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.5),
    copy=CopyCoefficients(seconds_per_byte=1.0),
)
LIMITS = SchedulerLimits(
    page_tokens=4, max_running=8, max_passes=4, budget_tokens=64, chunk_tokens=64, layers_per_step=2
)
REPLICA = ReplicaConfig(profile=PROFILE, limits=LIMITS, pages=64, page_bytes=8)
APART = dataclasses.replace(PROFILE, prompts_ride=False)


def asked(
    number: int, arrival: float, prompt: int = 4, output: int = 3, adapter: AdapterCost | None = None
) -> SimulatedRequest:
    return SimulatedRequest(number=number, arrival=arrival, prompt_tokens=prompt, output_tokens=output, adapter=adapter)


def run(
    *requests: SimulatedRequest,
    config: ReplicaConfig = REPLICA,
    replicas: int = 1,
    policy: PlacementPolicy | None = None,
) -> ClusterRun:
    cluster = Cluster(config, replicas, policy or MostIdle(), Targets(), check=True)
    return cluster.run(requests, requests_per_second=1.0)


def test_a_lone_request_takes_its_prefill_and_its_steps() -> None:
    (served,) = run(asked(0, 2.0)).served
    assert served.arrived == 2.0
    assert served.first_token == pytest.approx(2.0 + 1.0 + 4 * 0.5)
    assert served.finished == pytest.approx(5.0 + 2 * 1.1)
    assert served.generated == 3


def test_a_prompt_rides_in_the_step_of_another() -> None:
    first, second = run(asked(0, 0.0), asked(1, 1.0)).served
    # From 3.0 on one step, whose fixed part is paid once: its products are over the decode and four rows, together as
    # much as over five rows of prompts.
    assert second.first_token == pytest.approx(3.0 + 1.0 + 5 * 0.5)
    assert first.finished == pytest.approx(6.5 + 1.2)


def test_a_prompt_that_does_not_ride_interrupts_the_decodes() -> None:
    first, second = run(asked(0, 0.0), asked(1, 1.0), config=dataclasses.replace(REPLICA, profile=APART)).served
    assert second.first_token == pytest.approx(3.0 + 1.0 + 4 * 0.5)
    assert first.finished == pytest.approx(6.0 + 1.2 + 1.2)


def test_a_cold_adapter_streams_in_and_is_warm_afterwards() -> None:
    adapter = AdapterCost(7, 8, weight_bytes=8)
    first, second = run(asked(0, 0.0, adapter=adapter), asked(1, 30.0, adapter=adapter)).served
    # The copy takes 8, the prefill 3: the longer, and one of four layers of the other.
    assert first.first_token == pytest.approx(8.0 + 3.0 / 4)
    assert second.first_token == pytest.approx(30.0 + 3.0)


def test_a_cold_prompt_beside_a_decode_advances_layers_between_its_steps() -> None:
    """Two of four layers between two steps, as far as the weights have come; no layer when nothing has."""
    adapter = AdapterCost(7, 8, weight_bytes=2)
    first, second = run(asked(0, 0.0, output=9), asked(1, 3.5, adapter=adapter)).served
    # Decodes end at 3.0 + 1.1 k. At 4.1 the copy begins, and no layer has landed; at 5.2 half of the bytes have, so
    # two layers run (half of 3.0) in that step, and at 7.8 the other two. Nobody else's step waits for the copy.
    assert second.first_token == pytest.approx(4.1 + 1.1 + (1.1 + 1.5) + (1.1 + 1.5))
    assert first.finished == pytest.approx(3.0 + 8 * 1.1 + 2 * 1.5 + 2 * 0.1)


def test_an_adapter_gives_way_to_another_and_comes_back() -> None:
    config = dataclasses.replace(REPLICA, pages=5)
    one, two = AdapterCost(1, 8, weight_bytes=16), AdapterCost(2, 8, weight_bytes=16)
    arrivals = ((0.0, one), (100.0, two), (200.0, one))
    served = run(*(asked(n, at, output=2, adapter=each) for n, (at, each) in enumerate(arrivals)), config=config).served
    assert [item.first_token - item.arrived for item in served if item.first_token] == pytest.approx([16.75] * 3)


def test_requests_without_room_for_their_kv_are_preempted_and_end() -> None:
    found = run(asked(0, 0.0, output=20), asked(1, 0.1, output=20), config=dataclasses.replace(REPLICA, pages=8))
    assert found.preemptions > 0
    assert all(item.generated == 20 and item.finished is not None for item in found.served)


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(SimulationError, match="a request needs 76 pages, a replica has 64"):
        run(asked(0, 0.0, prompt=200, output=100))


_policies = st.sampled_from((RankAware(mean_output_tokens=4), MostIdle(), FirstFit(), RandomReplica(seed=3)))
_requests = st.lists(
    st.tuples(st.floats(0, 40), st.integers(1, 24), st.integers(1, 20), st.integers(-1, 5)), min_size=1, max_size=30
)


@settings(deadline=None)
@given(drawn=_requests, policy=_policies, replicas=st.integers(1, 3), pages=st.integers(20, 40), rides=st.booleans())
def test_everybody_is_served_whatever_comes(
    drawn: list[tuple[float, int, int, int]], policy: PlacementPolicy, replicas: int, pages: int, rides: bool
) -> None:
    config = dataclasses.replace(REPLICA, pages=pages, profile=dataclasses.replace(PROFILE, prompts_ride=rides))
    adapters = [AdapterCost(version, 8 << version % 3, 9 + version) for version in range(6)]
    requests = [
        asked(number, arrival, prompt, output, None if version < 0 else adapters[version])
        for number, (arrival, prompt, output, version) in enumerate(sorted(drawn))
    ]
    found = run(*requests, config=config, replicas=replicas, policy=policy)
    assert len(found.served) == len(requests)
    for item in found.served:
        assert item.generated == item.request.output_tokens
        assert item.first_token is not None
        assert item.finished is not None
        least = PROFILE.prefill.fixed_seconds + 0.5 * item.request.prompt_tokens
        if item.request.prompt_tokens > 1:
            assert item.first_token - item.arrived >= least * (1 - 1e-9)
        assert item.finished - item.first_token >= (item.generated - 1) * 1.1 - 1e-9


def test_the_same_requests_give_the_same_run() -> None:
    config = dataclasses.replace(REPLICA, profile=CARASERVE_MBGMV)
    requests = [asked(number, number * 0.02, adapter=AdapterCost(number % 3, 8, 8)) for number in range(40)]
    first, second = (run(*requests, config=config, replicas=2, policy=RandomReplica(seed=5)) for _ in range(2))
    assert first == second
    assert first.seconds < math.inf
