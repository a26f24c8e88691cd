"""Step plans: what they admit, grow, preempt and group, and that every request ends in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.scheduler.batch import (
    AdmittedRequest,
    QueuedRequest,
    SchedulerLimits,
    StepPlan,
    pages_for,
    plan_step,
)
from segue.scheduler.eviction import EvictionCandidate

LIMITS = SchedulerLimits(page_tokens=4, max_running=8, max_passes=4, budget_tokens=16, layers_per_step=2)


@dataclass
class FakeResidency:
    """Adapters as the scheduler sees them: the pages that each needs, and those of each that is resident."""

    needs: dict[int, int] = field(default_factory=dict)
    resident: set[int] = field(default_factory=set)
    landed: set[int] = field(default_factory=set)
    in_use: set[int] = field(default_factory=set)

    def pages_to_reserve(self, version_id: int) -> int:
        return 0 if version_id in self.resident else self.needs[version_id]

    def is_landed(self, version_id: int) -> bool:
        return version_id in self.landed

    def evictable(self) -> Sequence[EvictionCandidate]:
        return [
            EvictionCandidate(
                version_id=version_id,
                pages=self.needs[version_id],
                bring_back_seconds=1.0,
                recent_uses=1.0,
                idle_seconds=1.0 + version_id,
            )
            for version_id in sorted(self.landed - self.in_use)
        ]


def queued(number: int, tokens: int = 4, version_id: int | None = None) -> QueuedRequest:
    return QueuedRequest(number=number, tokens=tokens, version_id=version_id)


def decoding(number: int, tokens: int, pages: int, version_id: int | None = None) -> AdmittedRequest:
    return AdmittedRequest(
        number=number,
        tokens=tokens,
        computed_tokens=tokens - 1,
        pages=pages,
        version_id=version_id,
        in_flight=False,
    )


def plan(
    queue: Sequence[QueuedRequest] = (),
    admitted: Sequence[AdmittedRequest] = (),
    free_pages: int = 100,
    residency: FakeResidency | None = None,
    passes_in_flight: int = 0,
) -> StepPlan:
    return plan_step(
        queue,
        admitted,
        free_pages=free_pages,
        passes_in_flight=passes_in_flight,
        residency=residency or FakeResidency(),
        limits=LIMITS,
    )


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
    residency = FakeResidency(needs={1: 6, 2: 6}, resident={1, 2}, landed={1, 2})
    decided = plan([queued(9, version_id=1)], free_pages=0, residency=residency)
    assert decided.evict == (2,)
    assert [item.number for item in decided.admit] == [9]


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    admitted = [decoding(1, tokens=5, pages=1), decoding(2, tokens=5, pages=1), decoding(3, tokens=4, pages=1)]
    decided = plan([queued(8)], admitted, free_pages=0)
    assert decided.preempt == (3,)
    assert decided.grow == (1,)
    assert decided.decode == (1,)
    assert decided.admit == ()


def test_a_request_in_flight_is_left_alone() -> None:
    flying = AdmittedRequest(number=2, tokens=5, computed_tokens=4, pages=1, version_id=None, in_flight=True)
    decided = plan((), [decoding(1, tokens=5, pages=1), flying], free_pages=0)
    assert decided == StepPlan()


def test_cold_rows_are_grouped_by_adapter_and_warm_rows_together() -> None:
    residency = FakeResidency(needs={1: 1, 2: 1, 3: 1}, resident={1}, landed={1})
    queue = [
        queued(1, version_id=1),
        queued(2),
        queued(3, version_id=2),
        queued(4, version_id=3),
        queued(5, version_id=2),
    ]
    decided = plan(queue, residency=residency)
    groups = {item.version_id: [rows.number for rows in item.rows] for item in decided.passes}
    assert groups == {None: [1, 2], 2: [3, 5], 3: [4]}


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    (only,) = plan([queued(1, tokens=40)]).passes
    assert [(rows.start, rows.count) for rows in only.rows] == [(0, 16)]


def test_a_cold_request_decodes_in_a_pass_of_its_own() -> None:
    residency = FakeResidency(needs={1: 1}, resident={1})
    decided = plan(
        (), [decoding(1, tokens=6, pages=2, version_id=1), decoding(2, tokens=6, pages=2)], residency=residency
    )
    assert decided.decode == (2,)
    assert [(item.version_id, item.rows[0].start, item.rows[0].count) for item in decided.passes] == [(1, 5, 1)]


def test_passes_are_bounded() -> None:
    residency = FakeResidency(needs=dict.fromkeys(range(8), 1))
    queue = [queued(number, version_id=number) for number in range(8)]
    assert len(plan(queue, residency=residency, passes_in_flight=1).passes) == LIMITS.max_passes - 1


@dataclass
class FakeWorld:
    """Carries plans out on counters alone; a cold adapter lands a few steps after its pages were given."""

    needs: dict[int, int]
    jobs: list[tuple[int, int, int | None]]
    pages: int
    landing: dict[int, int] = field(default_factory=dict)

    def run(self) -> int:
        """Steps until every request has generated its tokens."""
        residency = FakeResidency(needs=self.needs)
        goal = {number: prompt + generate for number, (prompt, generate, _) in enumerate(self.jobs)}
        version = {number: version_id for number, (_, _, version_id) in enumerate(self.jobs)}
        queue = {number: prompt for number, (prompt, _, _) in enumerate(self.jobs)}
        held: dict[int, list[int]] = {}  # number -> [tokens, computed, pages]
        for step in range(10_000):
            if not queue and not held:
                return step
            self._land(residency)
            residency.in_use = {value for number in held if (value := version[number]) is not None}
            free = self.pages - sum(item[2] for item in held.values()) - sum(self.needs[v] for v in residency.resident)
            assert free >= 0, "more pages are held than there are"
            admitted = [
                AdmittedRequest(
                    number=number,
                    tokens=tokens,
                    computed_tokens=computed,
                    pages=pages,
                    version_id=version[number],
                    in_flight=False,
                )
                for number, (tokens, computed, pages) in held.items()
            ]
            decided = plan(
                [queued(number, tokens, version[number]) for number, tokens in sorted(queue.items())],
                admitted,
                free_pages=free,
                residency=residency,
            )
            if admitted:
                assert admitted[0].number not in decided.preempt, "the oldest was preempted"
            self._carry_out(decided, residency, queue, held)
            for number in [number for number, item in held.items() if item[0] >= goal[number]]:
                del held[number]
        raise AssertionError("the requests do not end")

    def _land(self, residency: FakeResidency) -> None:
        for version_id in list(self.landing):
            self.landing[version_id] -= 1
            if self.landing[version_id] == 0:
                residency.landed.add(version_id)
                del self.landing[version_id]

    def _carry_out(
        self, decided: StepPlan, residency: FakeResidency, queue: dict[int, int], held: dict[int, list[int]]
    ) -> None:
        residency.resident.difference_update(decided.evict)
        residency.landed.difference_update(decided.evict)
        for number in decided.preempt:
            queue[number] = held.pop(number)[0]
        for number in decided.grow:
            held[number][2] += 1
        for item in decided.admit:
            held[item.number] = [queue.pop(item.number), 0, item.kv_pages]
            if item.adapter_pages:
                assert item.version_id is not None
                residency.resident.add(item.version_id)
                self.landing[item.version_id] = 3
        ran = [(number, held[number][0] - 1, 1) for number in decided.decode]
        ran += [(rows.number, rows.start, rows.count) for item in decided.passes for rows in item.rows]
        assert len({number for number, _, _ in ran}) == len(ran), "a request computes twice in one step"
        for number, start, count in ran:
            tokens, computed, pages = held[number]
            assert start == computed
            assert start + count <= pages * LIMITS.page_tokens, "KV is written beyond the request's pages"
            held[number][1] = start + count
            held[number][0] = tokens + (start + count == tokens)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from([None, 0, 1, 2])), min_size=1, max_size=14
    ),
    st.integers(0, 12),
)
def test_every_request_ends_in_the_smallest_pool_that_can_hold_each(
    jobs: list[tuple[int, int, int | None]], spare_pages: int
) -> None:
    needs = {0: 3, 1: 5, 2: 8}
    largest = max(
        (0 if version_id is None else needs[version_id]) + pages_for(prompt + generate, LIMITS.page_tokens) + 1
        for prompt, generate, version_id in jobs
    )
    steps = FakeWorld(needs=needs, jobs=jobs, pages=largest + spare_pages).run()
    assert steps <= sum(prompt + generate + 8 for prompt, generate, _ in jobs) * 2


def test_limits_bound_the_running_requests() -> None:
    admitted = [decoding(number, tokens=3, pages=1) for number in range(LIMITS.max_running)]
    assert plan([queued(99)], admitted).admit == ()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 4) == pages
