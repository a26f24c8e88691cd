"""What one engine step does: who is evicted, preempted and admitted, which rows run at once, and which passes start.

Who goes before whom is the policy's to say. Progress rests on rules that hold for every policy. A request is admitted
only when the pool has room for its adapter, its prompt's KV and one page more. A request takes pages only from those
admitted after it, so the oldest is never preempted, and the oldest's prompt is computed first: it always ends. In the
queue a request is overtaken only as the policy's order has it, and while one before it computes the greater part of its
prompt.

Without room for its adapter a request is admitted where CPU workers can serve it alone, and sooner than pages come
free; its adapter gets pages as soon as there are some. Where the workers fail the oldest, they are taken from younger
requests: those of all are enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from segue.scheduler.eviction import choose_victims
from segue.scheduler.plan import (
    AdapterPages,
    AdapterResidency,
    Admission,
    AdmittedRequest,
    CpuService,
    PassPlan,
    PassRows,
    PrefixMatch,
    PrefixPages,
    QueuedRequest,
    SchedulerLimits,
    StepPlan,
    pages_for,
)
from segue.scheduler.policy import AdmissionRoom, FirstCome, PromptRows, StepPolicy

_FIRST_COME = FirstCome()

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
    policy: StepPolicy = _FIRST_COME,
    cpu: CpuService | None = None,
) -> StepPlan:
    """Plan one step. ``queue`` is in the order in which requests are to be admitted, which under FirstCome is that of
    arrival; ``admitted`` is in the order of admission.

    Of the queue no more is read than is needed. Without ``cpu`` no adapter is served that has no pages.
    """
    draft = _Draft(free_pages=free_pages, residency=residency, prefixes=prefixes, limits=limits, policy=policy, cpu=cpu)
    draft.serve_oldest(admitted)
    draft.plan_decodes(admitted)
    decodes = len(draft.batch)
    draft.plan_adapters(admitted)
    # Whoever was preempted for lack of pages must not be outrun by a newcomer that takes them.
    if not draft.preempt and not draft.starved:
        draft.plan_admissions(queue, admitted)
    draft.plan_prompts(admitted, limits.max_passes - passes_in_flight)
    return StepPlan(
        evict=tuple(draft.evict),
        preempt=tuple(draft.preempt),
        reclaim_pages=draft.reclaim_pages,
        grow=tuple(draft.grow),
        adapters=tuple(draft.given),
        admit=tuple(draft.admit),
        batch=tuple(draft.batch),
        passes=tuple(draft.passes),
        layers_per_pass=limits.layers_per_step if decodes else None,
        rows_per_pass=draft.rows_per_pass(admitted) if decodes and limits.layers_per_step is None else None,
    )


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A plan in the making; ``free_pages`` counts what its decisions have left.

    ``decodes`` are the requests whose rows decode in ``batch``, ``newcomers`` those in ``admit``. All that are admitted
    then have these ``adapters`` and ``prompt_tokens`` to compute. ``held`` are the idle pages that admissions share,
    and ``released_pages`` counts those that preemptions make idle. ``reserved`` adapters have been given pages, or are
    used by admissions; ``on_cpu`` are without pages and used by requests that are, or are to be, admitted.
    """

    free_pages: int
    residency: AdapterResidency
    prefixes: PrefixPages
    limits: SchedulerLimits
    policy: StepPolicy
    cpu: CpuService | None
    evict: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    reclaim_pages: int = 0
    grow: list[int] = field(default_factory=list)
    given: list[AdapterPages] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    newcomers: dict[int, QueuedRequest] = field(default_factory=dict)
    adapters: set[int] = field(default_factory=set)
    prompt_tokens: int = 0
    decodes: list[AdmittedRequest] = field(default_factory=list)
    batch: list[PassRows] = field(default_factory=list)
    passes: list[PassPlan] = field(default_factory=list)
    starved: bool = False
    reserved: set[int] = field(default_factory=set)
    on_cpu: set[int] = field(default_factory=set)
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
        """Give each request that decodes the page it needs, oldest first, taking pages from younger ones if need be."""
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
                self.decodes.append(request)
                self.batch.append(PassRows(request.number, request.computed_tokens, 1))

    def _take_page(self, younger: Sequence[AdmittedRequest]) -> bool:
        """Take one page, preempting these requests in the policy's order until there is one; False if there is none."""
        if not self._preempt_for(1, younger):
            return False
        self.free_pages -= 1
        return True

    def _preempt_for(self, pages: int, younger: Sequence[AdmittedRequest], needed_version: int | None = None) -> bool:
        """Have so many pages, preempting these requests in the policy's order until there are; False if in vain."""
        if self.make_room(pages, needed_version):
            return True
        can_go = [item for item in younger if not item.in_flight and item.number not in self.preempt]
        victims = iter(self.policy.victims(can_go))
        while not self.make_room(pages, needed_version):
            victim = next(victims, None)
            if victim is None:
                return False
            self.preempt.append(victim.number)
            self.free_pages += victim.own_pages
            self.released_pages += victim.sole_pages
        return True

    def serve_oldest(self, admitted: Sequence[AdmittedRequest]) -> None:
        """Where the oldest request's adapter has no pages and the workers do not serve it, take them from younger ones.

        Before anything else is decided: who is preempted takes part in nothing.
        """
        if not admitted or admitted[0].in_flight or not self._lacks_pages(admitted[0].version_id):
            return
        oldest = admitted[0]
        if oldest.version_id is not None and not self._runs_on_cpu(oldest):
            pages = self.residency.pages_to_reserve(oldest.version_id)
            if self._preempt_for(pages + 1, admitted[1:], oldest.version_id):
                self._give_pages(oldest.version_id, pages)
            else:
                self.starved = True

    def _lacks_pages(self, version_id: int | None) -> bool:
        """Whether an adapter has no pages, and has not been given any by this plan."""
        if version_id is None or version_id in self.reserved:
            return False
        return self.residency.pages_to_reserve(version_id) > 0

    def _give_pages(self, version_id: int, pages: int) -> None:
        self.free_pages -= pages
        self.reserved.add(version_id)
        self.given.append(AdapterPages(version_id, pages))

    def plan_adapters(self, admitted: Sequence[AdmittedRequest]) -> None:
        """Give adapters that the CPU alone has served their pages, those of the oldest requests first."""
        for request in admitted:
            version_id = request.version_id
            if version_id is None or request.number in self.preempt or not self._lacks_pages(version_id):
                continue
            pages = self.residency.pages_to_reserve(version_id)
            if not (self.preempt or self.starved) and self.make_room(pages + 1, version_id):
                self._give_pages(version_id, pages)
            else:
                self.on_cpu.add(version_id)

    def _runs_on_cpu(self, request: AdmittedRequest | QueuedRequest) -> bool:
        """Whether the request, whose adapter has no pages, can be served without."""
        if self.cpu is None or request.version_id is None or not request.cpu_allowed:
            return False
        return self.cpu.pass_seconds(request.version_id, 1, 0.0) < math.inf

    def _joins_on_cpu(
        self, request: QueuedRequest, rows: int, missing_pages: int, admitted: Sequence[AdmittedRequest]
    ) -> bool:
        """Whether the request, with so many rows to compute, is to be admitted without pages for its adapter.

        Half of the passes are left to adapters that load: those are done with them soon.
        """
        others = len(self.on_cpu - {request.version_id})
        if self.cpu is None or others >= self.limits.max_passes // 2 or not self._runs_on_cpu(request):
            return False
        step_seconds = self.cpu.step_seconds(len(admitted))
        steps = steps_to_pages(admitted, missing_pages, self.cpu.held_pages)
        wait_seconds = step_seconds * steps if steps < math.inf else math.inf
        assert request.version_id is not None
        passes = -(-rows // self.limits.budget_tokens)
        return passes * self.cpu.pass_seconds(request.version_id, -(-rows // passes), step_seconds) <= wait_seconds

    def plan_admissions(self, queue: Iterable[QueuedRequest], admitted: Sequence[AdmittedRequest]) -> None:
        """Admit from the head of the queue, until one does not fit."""
        most = self.limits.max_running - len(admitted)
        if most <= 0:
            return
        self.adapters = {item.version_id for item in admitted if item.version_id is not None}
        self.prompt_tokens = sum(count for item in admitted if (count := item.tokens - item.computed_tokens) > 1)
        passed_over = 0
        waiting = iter(queue)
        while len(self.admit) < most and passed_over < MOST_PASSED_OVER:
            request = next(waiting, None)
            if request is None or request.version_id in self.evict:
                # What one whose adapter is to go needs now is known when the eviction has been carried out.
                return
            match = self.prefixes.match(request.number)
            if self._is_worth_waiting(request, match) or self._is_kept_out(request, most):
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
                rows = request.tokens - match.pages * self.limits.page_tokens
                missing = adapter_pages + reserve - self.free_pages
                on_cpu = adapter_pages > 0 and self._joins_on_cpu(request, rows, missing, admitted)
                if request.version_id is None or not on_cpu or not self.make_room(reserve, request.version_id):
                    self.held -= held
                    return
                adapter_pages = 0
                self.on_cpu.add(request.version_id)
            elif request.version_id is not None:
                self.reserved.add(request.version_id)
                self.on_cpu.discard(request.version_id)
            if request.version_id is not None:
                self.adapters.add(request.version_id)
            self.free_pages -= adapter_pages + kv_pages
            self.newcomers[request.number] = request
            self.prompt_tokens += request.tokens - match.pages * self.limits.page_tokens
            self.admit.append(
                Admission(
                    number=request.number,
                    version_id=request.version_id,
                    cached_pages=match.pages,
                    kv_pages=kv_pages,
                    adapter_pages=adapter_pages,
                )
            )

    def _is_kept_out(self, request: QueuedRequest, most: int) -> bool:
        places = most - len(self.admit)
        room = AdmissionRoom(places=places, adapters=self.adapters, prompt_tokens=self.prompt_tokens)
        return self.policy.keeps_out(request, room, self.limits)

    def _is_worth_waiting(self, request: QueuedRequest, match: PrefixMatch) -> bool:
        """Whether earlier requests are about to compute at least half of what this one would have to."""
        page_tokens = self.limits.page_tokens
        return 0 < match.pending_pages * page_tokens >= (request.tokens - match.pages * page_tokens) / 2

    def _adapter_pages(self, version_id: int | None) -> int:
        if version_id is None or version_id in self.reserved:
            return 0
        return self.residency.pages_to_reserve(version_id)

    def plan_prompts(self, admitted: Sequence[AdmittedRequest], max_new_passes: int) -> None:
        """Rows of warm adapters join the batch in the policy's order; the others go in passes."""
        warm: list[PromptRows] = []
        cold: dict[int, list[PassRows]] = {}
        for item in self.policy.prompt_order(list(self._uncomputed(admitted))):
            if item.version_id is None or self.residency.is_warm(item.version_id):
                warm.append(item)
            else:
                cold.setdefault(item.version_id, []).append(item.rows)
        if warm:
            budget_tokens = self.limits.budget_tokens
            if self.batch:
                budget_tokens = self.policy.prompt_tokens(self.decodes, warm, self.limits)
            self.batch.extend(_within(budget_tokens, [item.rows for item in warm]))
        self.passes.extend(self._passes(cold)[:max_new_passes])

    def rows_per_pass(self, admitted: Sequence[AdmittedRequest]) -> int:
        """An equal part, for each pass, of half the rows of prompts that the step has besides those that ride in it.

        Passes run beside the batch, which slows both, so the harm to those that decode is that of as many rows that
        ride, if not more.
        """
        under_way = [item for item in admitted if item.in_flight and item.tokens - item.computed_tokens > 1]
        passes = len(self.passes) + len({item.version_id for item in under_way})
        if not passes:
            return 0
        prompts = [
            PromptRows(
                PassRows(item.number, item.computed_tokens, item.tokens - item.computed_tokens),
                item.version_id,
                item.level,
            )
            for item in under_way
        ]
        levels = {item.number: item.level for item in admitted}
        levels.update((number, request.level) for number, request in self.newcomers.items())
        prompts += [
            PromptRows(rows, item.version_ids[0], levels[rows.number]) for item in self.passes for rows in item.rows
        ]
        riding = sum(rows.count for rows in self.batch[len(self.decodes) :])
        rows_left = self.policy.prompt_tokens(self.decodes, prompts, self.limits) - riding
        return max(0, rows_left) // (2 * passes)

    def _passes(self, cold: Mapping[int, Sequence[PassRows]]) -> list[PassPlan]:
        """A pass for each adapter; adapters in host memory, which no disk holds up, share one of ``merged_rows``."""
        budget_tokens = self.limits.budget_tokens
        passes: list[PassPlan] = []
        shared, left = -1, 0
        for version_id, members in cold.items():
            count = sum(rows.count for rows in members)
            can_share = version_id not in self.on_cpu and self.residency.is_in_host(version_id)
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

    def _uncomputed(self, admitted: Sequence[AdmittedRequest]) -> Iterator[PromptRows]:
        """All rows that could run now and do not decode in this step's batch, those of newcomers last."""
        page_tokens = self.limits.page_tokens
        stalled = {*self.preempt, *(rows.number for rows in self.batch)}
        for position, request in enumerate(admitted):
            needs_page = request.pages * page_tokens < request.tokens and request.number not in self.grow
            needs_adapter = request.version_id in self.on_cpu and not self._runs_on_cpu(request)
            if not (request.in_flight or request.number in stalled or needs_page or needs_adapter):
                count = request.tokens - request.computed_tokens
                rows = PassRows(request.number, request.computed_tokens, count)
                yield PromptRows(rows, request.version_id, request.level, position == 0)
        for item in self.admit:
            start, newcomer = item.cached_pages * page_tokens, self.newcomers[item.number]
            yield PromptRows(PassRows(item.number, start, newcomer.tokens - start), item.version_id, newcomer.level)


def steps_to_pages(admitted: Sequence[AdmittedRequest], missing_pages: int, held_pages: Callable[[int], int]) -> float:
    """Steps until so many pages are expected to come free; infinite where they never do.

    They do when requests end, which is a step for each token that is expected of them, and with the last user of an
    adapter the adapter's.
    """
    users = Counter(request.version_id for request in admitted)
    freed = 0
    for request in sorted(admitted, key=lambda item: item.expected_tokens):
        freed += request.own_pages + request.sole_pages
        users[request.version_id] -= 1
        if request.version_id is not None and users[request.version_id] == 0:
            freed += held_pages(request.version_id)
        if freed >= missing_pages:
            return request.expected_tokens
    return math.inf


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
