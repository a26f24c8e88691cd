"""Step plans: what they admit, grow, preempt and group."""

from __future__ import annotations

from dataclasses import replace

import pytest

from segue.scheduler.batch import MOST_PASSED_OVER
from segue.scheduler.plan import LEAST_PASS_LAYERS, PassRows, PrefixMatch, StepPlan, pages_for
from tests.scheduler.fakes import LIMITS, FakePrefixes, FakeResidency, admitted, decoding, plan, queued


def test_admission_keeps_one_page_for_the_first_token() -> None:
    assert plan([queued(1, tokens=8)], free_pages=2).admit == ()
    (admission,) = plan([queued(1, tokens=8)], free_pages=3).admit
    assert (admission.kv_pages, admission.adapter_pages) == (3, 0)


def test_admission_reserves_an_adapter_once_for_all_its_requests() -> None:
    residency = FakeResidency(needs={7: 5})
    admissions = plan([queued(1, version_id=7), queued(2, version_id=7)], residency=residency).admit
    assert [item.adapter_pages for item in admissions] == [5, 0]


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    assert plan([queued(1, tokens=80), queued(2)], free_pages=10).admit == ()


def test_room_is_made_by_evicting_the_adapter_that_is_not_needed() -> None:
    residency = FakeResidency(needs={1: 6, 2: 6}, resident={1, 2}, warm={1, 2})
    decided = plan([queued(9, version_id=1)], free_pages=0, residency=residency)
    assert decided.evict == (2,)
    assert [item.number for item in decided.admit] == [9]


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    running = [decoding(1, tokens=5, pages=1), decoding(2, tokens=5, pages=1), decoding(3, tokens=4, pages=1)]
    decided = plan([queued(8)], running, free_pages=0)
    assert decided.preempt == (3,)
    assert decided.grow == (1,)
    assert decided.batch == (PassRows(1, 4, 1),)
    assert decided.admit == ()


def test_preempting_goes_on_until_a_page_comes_free() -> None:
    """The youngest shares all its pages with others, so that it brings nothing."""
    sharing = admitted(3, 9, pages=2, computed_tokens=8, shared_pages=2)
    decided = plan((), [decoding(1, tokens=5, pages=1), decoding(2, tokens=4, pages=1), sharing], free_pages=0)
    assert decided.preempt == (3, 2)
    assert (decided.grow, decided.reclaim_pages) == ((1,), 0)


def test_a_page_that_a_preemption_makes_idle_is_given_up_for_the_oldest() -> None:
    sharing = admitted(2, 9, pages=2, computed_tokens=8, sole_pages=2)
    decided = plan((), [decoding(1, tokens=5, pages=1), sharing], free_pages=0)
    assert (decided.preempt, decided.grow, decided.reclaim_pages) == ((2,), (1,), 1)


def test_a_request_in_flight_is_left_alone() -> None:
    flying = admitted(2, 5, pages=1, computed_tokens=4, in_flight=True)
    assert plan((), [decoding(1, tokens=5, pages=1), flying], free_pages=0) == StepPlan()


def test_cold_rows_are_grouped_by_adapter_and_warm_rows_run_together() -> None:
    residency = FakeResidency(needs={1: 1, 2: 1, 3: 1}, resident={1}, warm={1})
    queue = [
        queued(1, version_id=1),
        queued(2),
        queued(3, version_id=2),
        queued(4, version_id=3),
        queued(5, version_id=2),
    ]
    decided = plan(queue, residency=residency)
    assert [rows.number for rows in decided.batch] == [1, 2]
    groups = {item.version_ids: [rows.number for rows in item.rows] for item in decided.passes}
    assert groups == {(2,): [3, 5], (3,): [4]}


def test_adapters_in_host_memory_share_passes_of_few_rows() -> None:
    """One that comes from disk goes alone, and so does one with more rows than are left; limits are kept."""
    limits = replace(LIMITS, merged_rows=10)
    residency = FakeResidency(needs=dict.fromkeys(range(1, 9), 1), in_host={1, 2, 4, 5, 6, 7})
    tokens = {1: 4, 2: 5, 3: 1, 4: 2, 5: 1, 6: 11, 7: 1}
    queue = [queued(number, count, version_id=number) for number, count in tokens.items()]
    decided = plan(queue, residency=residency, limits=limits)
    assert [item.version_ids for item in decided.passes] == [(1, 2), (3,), (4, 5, 7), (6,)]
    assert all(rows.count == tokens[rows.number] for item in decided.passes for rows in item.rows)
    decided = plan(queue, residency=residency, limits=limits, passes_in_flight=LIMITS.max_passes - 1)
    assert [item.version_ids for item in decided.passes] == [(1, 2)]
    assert all(len(item.version_ids) == 1 for item in plan(queue, residency=residency).passes)


def test_a_long_prompt_is_cut_to_the_budget_warm_or_cold() -> None:
    assert plan([queued(1, tokens=40)]).batch == (PassRows(1, 0, 16),)
    (only,) = plan([queued(1, tokens=40, version_id=5)], residency=FakeResidency(needs={5: 1})).passes
    assert only.rows == (PassRows(1, 0, 16),)


def test_warm_prompts_ride_with_decodes_in_chunks_oldest_first() -> None:
    running = [decoding(1, tokens=6, pages=2), admitted(2, 20, pages=6, computed_tokens=16), admitted(3, 20, pages=6)]
    decided = plan([queued(9)], running)
    assert decided.batch == (PassRows(1, 5, 1), PassRows(2, 16, 4), PassRows(3, 0, 2))
    assert [item.number for item in decided.admit] == [9]
    assert decided.layers_per_pass == LIMITS.layers_per_step


def test_without_decodes_passes_go_as_far_as_they_can() -> None:
    decided = plan([queued(1)])
    assert not decided.bounds_passes
    assert decided.most_layers(rows=3, layers=32) is None


def test_beside_decodes_passes_share_half_of_the_rows_that_do_not_ride() -> None:
    """Of twelve rows a step: four ride, and of the eight others two passes have two each."""
    limits = replace(LIMITS, layers_per_step=None, chunk_tokens=12)
    residency = FakeResidency(needs={1: 1, 2: 1}, resident={1})
    under_way = replace(admitted(3, 20, pages=6, version_id=1), in_flight=True)
    running = [decoding(1, tokens=6, pages=2), admitted(2, 20, pages=6, computed_tokens=16), under_way]
    decided = plan([queued(9, tokens=5, version_id=2)], running, residency=residency, limits=limits)
    assert [item.version_ids for item in decided.passes] == [(2,)]
    assert sum(rows.count for rows in decided.batch) == 1 + 4
    assert decided.rows_per_pass == 2
    assert decided.most_layers(rows=4, layers=32) == 16
    assert decided.most_layers(rows=100, layers=32) == LEAST_PASS_LAYERS
    assert plan([], running[:2], residency=residency, limits=limits).rows_per_pass == 0


def test_a_fixed_number_of_layers_is_what_passes_advance() -> None:
    decided = plan([], [decoding(1, tokens=6, pages=2)], limits=replace(LIMITS, layers_per_step=3))
    assert [decided.most_layers(rows=rows, layers=32) for rows in (1, 500)] == [3, 3]


def test_a_cold_request_decodes_in_a_pass_of_its_own() -> None:
    residency = FakeResidency(needs={1: 1}, resident={1})
    running = [decoding(1, tokens=6, pages=2, version_id=1), decoding(2, tokens=6, pages=2)]
    decided = plan((), running, residency=residency)
    assert decided.batch == (PassRows(2, 5, 1),)
    assert [(item.version_ids, item.rows) for item in decided.passes] == [((1,), (PassRows(1, 5, 1),))]


def test_passes_are_bounded() -> None:
    residency = FakeResidency(needs=dict.fromkeys(range(8), 1))
    queue = [queued(number, version_id=number) for number in range(8)]
    assert len(plan(queue, residency=residency, passes_in_flight=1).passes) == LIMITS.max_passes - 1


def test_what_is_cached_is_neither_computed_nor_given_pages() -> None:
    prefixes = FakePrefixes(idle_pages=3, matches={1: PrefixMatch(pages=3, idle=frozenset({7, 8}))})
    decided = plan([queued(1, tokens=14)], free_pages=2, prefixes=prefixes)
    (admission,) = decided.admit
    assert (admission.cached_pages, admission.kv_pages, decided.reclaim_pages) == (3, 1, 0)
    assert decided.batch == (PassRows(1, 12, 2),)


def test_idle_pages_that_an_admission_shares_are_not_given_up_for_it() -> None:
    """It needs two pages besides; of the three idle ones it uses two, so there is one to give up."""
    prefixes = FakePrefixes(idle_pages=3, matches={1: PrefixMatch(pages=2, idle=frozenset({7, 8}))})
    assert plan([queued(1, tokens=10)], free_pages=0, prefixes=prefixes).admit == ()
    decided = plan([queued(1, tokens=10)], free_pages=1, prefixes=prefixes)
    assert (len(decided.admit), decided.reclaim_pages) == (1, 1)


def test_requests_that_share_idle_pages_are_admitted_together() -> None:
    """Three share the same two, one a third page besides: there are three idle pages in all, and none to give up."""
    same, more = PrefixMatch(pages=2, idle=frozenset({7, 8})), PrefixMatch(pages=3, idle=frozenset({7, 8, 9}))
    prefixes = FakePrefixes(idle_pages=3, matches={1: same, 2: same, 3: more})
    queue = [queued(number, tokens=13) for number in (1, 2, 3)]
    decided = plan(queue, free_pages=6, prefixes=prefixes)
    assert [(item.number, item.cached_pages) for item in decided.admit] == [(1, 2), (2, 2), (3, 3)]
    assert [item.number for item in plan(queue, free_pages=4, prefixes=prefixes).admit] == [1, 2]


@pytest.mark.parametrize(("page_seconds", "evicted", "reclaimed"), [(0.01, (), 3), (10.0, (4,), 0)])
def test_room_comes_from_what_is_cheaper_to_lose(page_seconds: float, evicted: tuple[int, ...], reclaimed: int) -> None:
    residency = FakeResidency(needs={4: 3}, resident={4}, warm={4})
    prefixes = FakePrefixes(idle_pages=9, page_seconds=page_seconds)
    decided = plan([queued(1, tokens=8)], free_pages=0, residency=residency, prefixes=prefixes)
    assert (decided.evict, decided.reclaim_pages, len(decided.admit)) == (evicted, reclaimed, 1)


def test_who_shares_most_of_its_prompt_with_an_earlier_one_waits_for_it() -> None:
    prefixes = FakePrefixes(matches={2: PrefixMatch(pending_pages=2), 3: PrefixMatch(pending_pages=1)})
    decided = plan([queued(number, tokens=12) for number in (1, 2, 3)], prefixes=prefixes)
    assert [item.number for item in decided.admit] == [1, 3]


@pytest.mark.parametrize(("waiting", "admitted_numbers"), [(MOST_PASSED_OVER - 1, [1, 0]), (MOST_PASSED_OVER, [1])])
def test_those_who_wait_for_a_prefix_keep_nobody_out_up_to_a_bound(waiting: int, admitted_numbers: list[int]) -> None:
    matches = {number: PrefixMatch(pending_pages=9) for number in range(2, waiting + 2)}
    queue = [*(queued(number, tokens=12) for number in range(1, waiting + 2)), queued(0)]
    assert [item.number for item in plan(queue, prefixes=FakePrefixes(matches=matches)).admit] == admitted_numbers


def test_no_more_of_the_queue_is_read_than_is_needed() -> None:
    queue = iter([queued(number) for number in range(1, 100)])
    assert len(plan(queue).admit) == LIMITS.max_running
    assert next(queue).number == LIMITS.max_running + 1
    assert plan(queue, [decoding(number, tokens=3, pages=1) for number in range(LIMITS.max_running)]).admit == ()
    assert next(queue).number == LIMITS.max_running + 2


def test_limits_bound_the_running_requests() -> None:
    running = [decoding(number, tokens=3, pages=1) for number in range(LIMITS.max_running)]
    assert plan([queued(99)], running).admit == ()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 4) == pages
