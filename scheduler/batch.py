"""What one engine step does: who is evicted, preempted and admitted, which rows run at once, and which passes start.

First come, first served. Progress rests on two rules. A request is admitted only when the pool has room for its
adapter, its prompt's KV and one page more; and the oldest admitted request is never preempted, so it always ends.
A request is overtaken only while one that arrived before it computes the greater part of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from segue.scheduler.eviction import choose_victims
from segue.scheduler.plan import (
    AdapterResidency,
    Admission,
    AdmittedRequest,
    PassPlan,
    PassRows,
    PrefixMatch,
    PrefixPages,
    QueuedRequest,
    SchedulerLimits,
    StepPlan,
    pages_for,
)

# Requests that wait for an earlier one's prefix are passed over, so that they keep nobody behind them out: as many as
# two requests for 128 answers bring. Looking at one takes a few microseconds.
MOST_PASSED_OVER = 256


def plan_step(
    queue: Iterable[QueuedRequest],
    admitted: Sequence[AdmittedRequest],
    *,
    free_pages: int,
    passes_in_flight: int,
    residency: AdapterResidency,
    prefixes: PrefixPages,
    limits: SchedulerLimits,
) -> StepPlan:
    """Plan one step. ``queue`` is in the order of arrival, ``admitted`` in the order of admission.

    Of the queue no more is read than is needed.
    """
    draft = _Draft(free_pages=free_pages, residency=residency, prefixes=prefixes, limits=limits)
    draft.plan_decodes(admitted)
    decodes = len(draft.batch)
    # Whoever was preempted for lack of pages must not be outrun by a newcomer that takes them.
    if not draft.preempt and not draft.starved:
        draft.plan_admissions(queue, limits.max_running - len(admitted))
    draft.plan_prompts(admitted, limits.max_passes - passes_in_flight)
    return StepPlan(
        evict=tuple(draft.evict),
        preempt=tuple(draft.preempt),
        reclaim_pages=draft.reclaim_pages,
        grow=tuple(draft.grow),
        admit=tuple(draft.admit),
        batch=tuple(draft.batch),
        passes=tuple(draft.passes),
        layers_per_pass=limits.layers_per_step if decodes else None,
    )


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A plan in the making; ``free_pages`` counts what its decisions have left.

    ``prompt_tokens`` are those of each request in ``admit``. ``held`` are the idle pages that admissions share, and
    ``released_pages`` counts those that preemptions make idle.
    """

    free_pages: int
    residency: AdapterResidency
    prefixes: PrefixPages
    limits: SchedulerLimits
    evict: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    reclaim_pages: int = 0
    grow: list[int] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    batch: list[PassRows] = field(default_factory=list)
    passes: list[PassPlan] = field(default_factory=list)
    starved: bool = False
    reserved: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    released_pages: int = 0

    def is_warm(self, version_id: int | None) -> bool:
        return version_id is None or self.residency.is_warm(version_id)

    @property
    def idle_pages(self) -> int:
        """Pages that are idle before the step and that no decision has claimed."""
        return self.prefixes.idle_pages - len(self.held) - self.reclaim_pages

    def make_room(self, pages: int, needed_version: int | None = None) -> bool:
        """Have at least ``pages`` free by giving up unused adapters and idle pages, those that are cheapest to lose."""
        missing = pages - self.free_pages
        if missing <= 0:
            return True
        keep = {needed_version, *self.evict, *self.reserved}
        candidates = [item for item in self.residency.evictable() if item.version_id not in keep]
        stop = self.reclaim_pages + min(self.idle_pages, missing)
        candidates += self.prefixes.idle_candidates(stop)[self.reclaim_pages :]
        # Pages that were in use until now are given up last.
        from_released = max(0, missing - sum(item.pages for item in candidates))
        if from_released > self.released_pages:
            return False
        self.released_pages -= from_released
        victims = set(choose_victims(candidates, missing - from_released))
        self.evict.extend(sorted(version_id for version_id in victims if version_id >= 0))
        self.reclaim_pages += from_released + sum(version_id < 0 for version_id in victims)
        self.free_pages += from_released + sum(item.pages for item in candidates if item.version_id in victims)
        return True

    def plan_decodes(self, admitted: Sequence[AdmittedRequest]) -> None:
        """Give each request that decodes the page it needs, oldest first, taking pages from the youngest if need be."""
        for position, request in enumerate(admitted):
            decodes = request.computed_tokens == request.tokens - 1
            if request.in_flight or request.number in self.preempt or not decodes:
                continue
            if request.pages * self.limits.page_tokens < request.tokens:
                if not self._take_page(admitted[position + 1 :]):
                    self.starved = True
                    continue
                self.grow.append(request.number)
            if self.is_warm(request.version_id):
                self.batch.append(PassRows(request.number, request.computed_tokens, 1))

    def _take_page(self, younger: Sequence[AdmittedRequest]) -> bool:
        """Take one page, preempting the youngest of these requests until there is one; False when there is none."""
        while not self.make_room(1):
            victims = (item for item in reversed(younger) if not item.in_flight and item.number not in self.preempt)
            victim = next(victims, None)
            if victim is None:
                return False
            self.preempt.append(victim.number)
            self.free_pages += victim.own_pages
            self.released_pages += victim.sole_pages
        self.free_pages -= 1
        return True

    def plan_admissions(self, queue: Iterable[QueuedRequest], most: int) -> None:
        """Admit at most so many from the head of the queue, until one does not fit."""
        passed_over = 0
        waiting = iter(queue)
        while len(self.admit) < most and passed_over < MOST_PASSED_OVER:
            request = next(waiting, None)
            if request is None or request.version_id in self.evict:
                # What one whose adapter is to go needs now is known when the eviction has been carried out.
                return
            match = self.prefixes.match(request.number)
            if self._is_worth_waiting(request, match):
                passed_over += 1
                continue
            adapter_pages = self._adapter_pages(request.version_id)
            kv_pages = pages_for(request.tokens + 1, self.limits.page_tokens) - match.pages
            reserve = pages_for(request.tokens, self.limits.page_tokens) + 1 - match.pages
            held = match.idle - self.held
            if len(held) > self.idle_pages:
                # Some of them were just claimed for a decode: the next step knows more.
                return
            self.held |= held
            if not self.make_room(adapter_pages + reserve, request.version_id):
                self.held -= held
                return
            self.free_pages -= adapter_pages + kv_pages
            if request.version_id is not None:
                self.reserved.add(request.version_id)
            self.prompt_tokens[request.number] = request.tokens
            self.admit.append(
                Admission(
                    number=request.number,
                    version_id=request.version_id,
                    cached_pages=match.pages,
                    kv_pages=kv_pages,
                    adapter_pages=adapter_pages,
                )
            )

    def _is_worth_waiting(self, request: QueuedRequest, match: PrefixMatch) -> bool:
        """Whether earlier requests are about to compute at least half of what this one would have to."""
        page_tokens = self.limits.page_tokens
        return 0 < match.pending_pages * page_tokens >= (request.tokens - match.pages * page_tokens) / 2

    def _adapter_pages(self, version_id: int | None) -> int:
        if version_id is None or version_id in self.reserved:
            return 0
        return self.residency.pages_to_reserve(version_id)

    def plan_prompts(self, admitted: Sequence[AdmittedRequest], max_new_passes: int) -> None:
        """Rows of warm adapters join the batch, oldest first; the others go in passes."""
        budget_tokens = self.limits.chunk_tokens if self.batch else self.limits.budget_tokens
        warm: list[PassRows] = []
        cold: dict[int, list[PassRows]] = {}
        for version_id, rows in self._uncomputed(admitted):
            if version_id is None or self.residency.is_warm(version_id):
                warm.append(rows)
            else:
                cold.setdefault(version_id, []).append(rows)
        self.batch.extend(_within(budget_tokens, warm))
        self.passes.extend(self._passes(cold)[:max_new_passes])

    def _passes(self, cold: Mapping[int, Sequence[PassRows]]) -> list[PassPlan]:
        """A pass for each adapter; adapters in host memory, which no disk holds up, share one of ``merged_rows``."""
        budget_tokens = self.limits.budget_tokens
        passes: list[PassPlan] = []
        shared, left = -1, 0
        for version_id, members in cold.items():
            count = sum(rows.count for rows in members)
            can_share = self.residency.is_in_host(version_id)
            if can_share and count <= left:
                before = passes[shared]
                passes[shared] = PassPlan(rows=(*before.rows, *members), version_ids=(*before.version_ids, version_id))
                left -= count
                continue
            passes.append(PassPlan(rows=_within(budget_tokens, members), version_ids=(version_id,)))
            own_left = min(self.limits.merged_rows, budget_tokens) - count
            if can_share and own_left > left:
                shared, left = len(passes) - 1, own_left
        return passes

    def _uncomputed(self, admitted: Sequence[AdmittedRequest]) -> Iterator[tuple[int | None, PassRows]]:
        """All rows that could run now and do not decode in this step's batch, those of newcomers last."""
        page_tokens = self.limits.page_tokens
        stalled = {*self.preempt, *(rows.number for rows in self.batch)}
        for request in admitted:
            needs_page = request.pages * page_tokens < request.tokens and request.number not in self.grow
            if not (request.in_flight or request.number in stalled or needs_page):
                count = request.tokens - request.computed_tokens
                yield request.version_id, PassRows(request.number, request.computed_tokens, count)
        for item in self.admit:
            start = item.cached_pages * page_tokens
            yield item.version_id, PassRows(item.number, start, self.prompt_tokens[item.number] - start)


def _within(budget_tokens: int, members: Sequence[PassRows]) -> tuple[PassRows, ...]:
    """As many rows as the budget allows; what is left waits for a later step."""
    taken = []
    for rows in members:
        if budget_tokens == 0:
            break
        count = min(rows.count, budget_tokens)
        taken.append(PassRows(rows.number, rows.start, count))
        budget_tokens -= count
    return tuple(taken)
