"""Placement: CaraServe's two replicas, and that no target is missed where it could be met."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.bench.simulate.profiles import CARASERVE_BGMV, CARASERVE_MBGMV
from segue.config import ConfigError
from segue.scheduler.cost_model import CostProfile, LoraForm, StepLoad
from segue.scheduler.placement import (
    AdapterCost,
    FirstFit,
    MostIdle,
    PlacementRequest,
    RandomReplica,
    RankAware,
)
from tests.scheduler.cost_cases import COEFFICIENTS, PROFILE, RANK_BYTES, batch

POLICY = RankAware(mean_output_tokens=64)


@dataclass(kw_only=True)
class FakeReplica:
    profile: CostProfile = PROFILE
    decodes: StepLoad = field(default_factory=StepLoad)
    prompts: StepLoad = field(default_factory=StepLoad)
    prompt_share: float = 0.0
    time_per_token_seconds: float = math.inf
    present: frozenset[int] = frozenset()
    resident: frozenset[int] = frozenset()
    room: bool = True

    @property
    def requests(self) -> int:
        return self.decodes.tokens

    def uses_adapter(self, version_id: int) -> bool:
        return version_id in self.present

    def is_resident(self, version_id: int) -> bool:
        return version_id in self.resident

    def has_room(self, _request: PlacementRequest) -> bool:
        return self.room


def request(rank: int = 64, target_seconds: float = math.inf, prompt_tokens: int = 100) -> PlacementRequest:
    adapter = AdapterCost(1, rank, rank * RANK_BYTES) if rank else None
    return PlacementRequest(
        number=1, prompt_tokens=prompt_tokens, adapter=adapter, time_per_token_seconds=target_seconds
    )


@pytest.mark.parametrize(
    ("profile", "latencies_ms", "chosen"),
    [(CARASERVE_BGMV, (34.8, 35.8), 1), (CARASERVE_MBGMV, (35.3, 35.9), 0)],
    ids=lambda value: value.name if isinstance(value, CostProfile) else None,
)
def test_caraserves_two_replicas(profile: CostProfile, latencies_ms: tuple[float, float], chosen: int) -> None:
    """Toppings, section 2.3: 24 requests of rank 32, 16 of rank 64, and another of rank 64, within 36 ms a token."""
    replicas = [
        FakeReplica(profile=profile, decodes=batch([32] * 24), time_per_token_seconds=0.036),
        FakeReplica(profile=profile, decodes=batch([64] * 16), time_per_token_seconds=0.036),
    ]
    now = tuple(round(1e3 * profile.decode_seconds(replica.decodes), 1) for replica in replicas)
    assert now == latencies_ms
    wanted = request(rank=64, target_seconds=0.036)
    assert POLICY.choose(wanted, replicas) == chosen
    excess = [POLICY.cost(wanted, replica).excess_seconds for replica in replicas]
    assert excess[chosen] == 0.0 < excess[1 - chosen]


_replicas = st.builds(
    FakeReplica,
    profile=st.sampled_from(LoraForm).map(lambda form: dataclasses.replace(PROFILE, decode=COEFFICIENTS[form])),
    decodes=st.lists(st.sampled_from((0, 8, 64)), max_size=80).map(batch),
    prompts=st.lists(st.sampled_from((8, 64)), max_size=3).map(batch),
    prompt_share=st.floats(0, 0.9),
    time_per_token_seconds=st.sampled_from((0.006, 0.02, 0.05, math.inf)),
    present=st.sampled_from((frozenset(), frozenset({1}))),
    resident=st.sampled_from((frozenset(), frozenset({1}))),
)


@given(
    replicas=st.lists(_replicas, min_size=1, max_size=8),
    rank=st.sampled_from((0, 8, 64)),
    target=st.sampled_from((0.006, 0.03, math.inf)),
)
def test_no_target_is_missed_where_another_replica_meets_all(
    replicas: list[FakeReplica], rank: int, target: float
) -> None:
    wanted = request(rank, target)
    costs = [POLICY.cost(wanted, replica) for replica in replicas]
    chosen = costs[POLICY.choose(wanted, replicas)]
    if any(cost.excess_seconds == 0 for cost in costs):
        assert chosen.excess_seconds == 0
        assert chosen.added_seconds == min(cost.added_seconds for cost in costs if cost.excess_seconds == 0)
    else:
        assert chosen.excess_seconds == min(cost.excess_seconds for cost in costs)


@given(replicas=st.lists(_replicas, min_size=2, max_size=6), full=st.integers(0, 5))
def test_a_replica_without_room_is_chosen_last(replicas: list[FakeReplica], full: int) -> None:
    replicas[full % len(replicas)].room = False
    for policy in (POLICY, FirstFit()):
        assert policy.choose(request(), replicas) != full % len(replicas)


def test_of_equals_the_one_that_has_the_adapter_is_chosen() -> None:
    away = FakeReplica(decodes=batch([8, 8]))
    near = dataclasses.replace(away, resident=frozenset({1}))
    using = dataclasses.replace(near, present=frozenset({1}))
    assert POLICY.choose(request(), [away, near]) == 1
    assert POLICY.choose(request(), [away, near, using]) == 2
    assert POLICY.choose(request(), [away, away]) == 0


def test_what_prompts_take_counts_against_the_target() -> None:
    calm = FakeReplica(decodes=batch([8] * 4), time_per_token_seconds=0.006)
    busy = dataclasses.replace(calm, decodes=batch([8] * 2), prompt_share=0.5)
    assert POLICY.choose(request(rank=8), [busy, calm]) == 1
    assert POLICY.choose(request(rank=8), [dataclasses.replace(busy, prompt_share=0.0), calm]) == 0


def test_a_short_answers_wait_must_fit_into_its_target() -> None:
    """Few others are harmed where many prompts wait; a short answer would miss its target there."""
    replicas = [FakeReplica(decodes=batch([8]), prompts=batch([8] * 400)), FakeReplica(decodes=batch([8] * 20))]
    wanted = request(rank=8, target_seconds=0.0060)
    assert POLICY.choose(wanted, replicas) == 0
    aware = RankAware(mean_output_tokens=64, short_output_tokens=16)
    assert aware.cost(wanted, replicas[0]).excess_seconds > aware.cost(wanted, replicas[1]).excess_seconds
    assert aware.choose(wanted, replicas) == 1


def test_it_waits_for_fewer_prompts_where_nobody_else_is_harmed() -> None:
    replicas = [FakeReplica(prompts=batch([8] * 40)), FakeReplica()]
    assert POLICY.choose(request(), replicas) == 1


def test_the_baselines() -> None:
    replicas = [FakeReplica(decodes=batch([8] * count)) for count in (3, 1, 5, 1)]
    assert MostIdle().choose(request(), replicas) == 1
    assert FirstFit().choose(request(), replicas) == 2
    replicas[2].room = False
    assert FirstFit().choose(request(), replicas) == 0
    for replica in replicas:
        replica.room = False
    assert FirstFit().choose(request(), replicas) == 1


def test_random_replicas_are_spread_and_repeat_with_the_seed() -> None:
    replicas = [FakeReplica()] * 4
    drawn = {
        seed: [RandomReplica(seed=seed).choose(dataclasses.replace(request(), number=number), replicas)
               for number in range(400)]
        for seed in (1, 2)
    }  # fmt: skip
    again = [
        RandomReplica(seed=1).choose(dataclasses.replace(request(), number=number), replicas) for number in range(400)
    ]
    assert drawn[1] == again != drawn[2]
    assert min(drawn[1].count(place) for place in range(4)) > 60


def test_an_answers_length_must_be_one() -> None:
    with pytest.raises(ConfigError, match="mean_output_tokens: must be positive, is 0"):
        RankAware(mean_output_tokens=0)
