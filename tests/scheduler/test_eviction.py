from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.scheduler.eviction import EvictionCandidate, choose_victims, decayed, eviction_cost

PLAIN = EvictionCandidate(version_id=1, pages=4, bring_back_seconds=1.0, recent_uses=1.0, idle_seconds=10.0)


def test_cost_is_time_to_bring_back_times_decayed_uses() -> None:
    candidate = replace(PLAIN, bring_back_seconds=2.0, recent_uses=8.0, idle_seconds=120.0)
    assert eviction_cost(candidate, half_life_seconds=60.0) == pytest.approx(2.0 * 8.0 / 4.0)


def test_decay_never_grows_when_a_clock_runs_backwards() -> None:
    assert decayed(3.0, -5.0) == 3.0


def test_the_least_used_goes_first() -> None:
    hot = replace(PLAIN, version_id=2, recent_uses=50.0)
    assert choose_victims([hot, PLAIN], 1) == (1,)


def test_the_longest_idle_goes_first() -> None:
    idle = replace(PLAIN, version_id=2, idle_seconds=600.0)
    assert choose_victims([PLAIN, idle], 1) == (2,)


def test_what_comes_back_from_disk_is_dearer_than_what_comes_back_from_host() -> None:
    on_host = replace(PLAIN, version_id=2, bring_back_seconds=0.002)
    assert choose_victims([PLAIN, on_host], 1) == (2,)


def test_a_large_adapter_goes_before_a_small_one_of_the_same_cost() -> None:
    large = replace(PLAIN, version_id=2, pages=16)
    assert choose_victims([PLAIN, large], 1) == (2,)


def test_what_is_in_use_is_never_chosen() -> None:
    used = replace(PLAIN, version_id=2, users=1, recent_uses=0.0)
    assert choose_victims([used, PLAIN], 4) == (1,)
    assert choose_victims([used, PLAIN], 5) == ()


def test_nothing_is_evicted_in_vain_or_without_need() -> None:
    assert choose_victims([PLAIN], 5) == ()
    assert choose_victims([PLAIN], 0) == ()
    assert choose_victims([], 1) == ()


def test_enough_pages_are_freed_and_no_victim_is_needless() -> None:
    candidates = [
        replace(PLAIN, version_id=number, pages=pages, recent_uses=uses)
        for number, (pages, uses) in enumerate([(1, 0.1), (2, 0.3), (8, 4.0), (3, 9.0), (5, 2.0)])
    ]
    pages = {candidate.version_id: candidate.pages for candidate in candidates}
    for needed in range(1, 20):
        victims = choose_victims(candidates, needed)
        freed = sum(pages[victim] for victim in victims)
        assert freed >= needed
        assert all(freed - pages[victim] < needed for victim in victims)


def test_small_victims_are_spared_when_a_large_one_suffices() -> None:
    small = replace(PLAIN, version_id=1, pages=1, recent_uses=0.01)
    large = replace(PLAIN, version_id=2, pages=10, recent_uses=2.0)
    assert choose_victims([small, large], 10) == (2,)


# The few values that come up again and again make ties.
CANDIDATES = st.lists(
    st.builds(
        EvictionCandidate,
        version_id=st.integers(0, 1000),
        pages=st.integers(0, 12),
        bring_back_seconds=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 10.0),
        recent_uses=st.sampled_from([0.0, 1.0, 4.0]) | st.floats(0.0, 100.0),
        idle_seconds=st.sampled_from([-1.0, 0.0, 60.0]) | st.floats(0.0, 1000.0),
        users=st.sampled_from([0, 0, 0, 1, 3]),
    ),
    max_size=9,
    unique_by=lambda candidate: candidate.version_id,
)


@settings(max_examples=200, deadline=None)
@given(CANDIDATES, st.integers(-1, 60))
def test_victims_are_unused_and_free_enough_without_a_needless_one(
    candidates: list[EvictionCandidate], needed: int
) -> None:
    unused = {candidate.version_id: candidate.pages for candidate in candidates if candidate.users == 0}
    victims = choose_victims(candidates, needed)
    assert len(set(victims)) == len(victims)
    assert unused.keys() >= set(victims)
    freed = sum(unused[victim] for victim in victims)
    if needed <= 0 or sum(unused.values()) < needed:
        assert victims == ()
    else:
        assert freed >= needed
        assert all(freed - unused[victim] < needed for victim in victims)


@settings(max_examples=200, deadline=None)
@given(st.data(), CANDIDATES, st.integers(1, 60))
def test_the_order_of_the_candidates_does_not_matter(
    data: st.DataObject, candidates: list[EvictionCandidate], needed: int
) -> None:
    shuffled = data.draw(st.permutations(candidates))
    assert choose_victims(shuffled, needed) == choose_victims(candidates, needed)


@settings(max_examples=200, deadline=None)
@given(CANDIDATES, st.integers(1, 12))
def test_a_lone_victim_is_a_cheapest_one_per_page_of_those_that_suffice(
    candidates: list[EvictionCandidate], needed: int
) -> None:
    """When every candidate suffices by itself, the one that is cheapest per page is the only victim."""
    large = [replace(candidate, pages=candidate.pages + needed, users=0) for candidate in candidates]
    costs = {candidate.version_id: eviction_cost(candidate) / candidate.pages for candidate in large}
    victims = choose_victims(large, needed)
    assert len(victims) == min(1, len(large))
    assert all(costs[victim] == min(costs.values()) for victim in victims)
