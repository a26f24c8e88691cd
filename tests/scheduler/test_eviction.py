from __future__ import annotations

from dataclasses import replace

import pytest

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
