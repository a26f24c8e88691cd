"""What one engine step does: who is evicted, preempted and admitted, who decodes, and which prefill rows start.

First come, first served. Progress rests on two rules. A request is admitted only when the pool has room for its
adapter, its prompt's KV and one page more; and the oldest admitted request is never preempted, so it always ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from segue.scheduler.eviction import EvictionCandidate, choose_victims


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """A request that holds no pages. ``tokens`` counts its prompt and what it had generated before a preemption."""

    number: int
    tokens: int
    version_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedRequest:
    """A request that holds pages. Its KV covers ``computed_tokens`` of its ``tokens``.

    ``in_flight``: some of its rows are in a pass that has not ended, so it can neither be given rows nor be preempted.
    """

    number: int
    tokens: int
    computed_tokens: int
    pages: int
    version_id: int | None
    in_flight: bool


class AdapterResidency(Protocol):
    """What the scheduler must see of the adapters."""

    def pages_to_reserve(self, version_id: int) -> int:
        """Pages that the adapter still needs: 0 when it has been given its pages."""
        ...

    def is_landed(self, version_id: int) -> bool:
        """Whether all layers are on the device."""
        ...

    def evictable(self) -> Sequence[EvictionCandidate]:
        """Adapters whose pages no admitted request, copy or step refers to."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step: see EngineConfig for their meaning and units."""

    page_tokens: int
    max_running: int
    max_passes: int
    budget_tokens: int
    layers_per_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request to admit, the KV pages to give it, and those to give its adapter (0: it has them or needs none)."""

    number: int
    version_id: int | None
    kv_pages: int
    adapter_pages: int


@dataclass(frozen=True, slots=True)
class PassRows:
    """Rows of one request in a pass: its tokens ``start`` to ``start + count``."""

    number: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """A pass to start. ``version_id`` is the adapter still loading, None for rows whose adapters have all landed."""

    rows: tuple[PassRows, ...]
    version_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The decisions of one step, to be carried out in the order of the fields.

    ``grow`` names requests that get one more page, ``decode`` those that decode one token together.
    ``layers_per_pass`` is how far each pass advances, None for as far as it can.
    """

    evict: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()
    grow: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    admit: tuple[Admission, ...] = ()
    passes: tuple[PassPlan, ...] = ()
    layers_per_pass: int | None = None


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that the KV of ``tokens`` tokens fills."""
    return -(-tokens // page_tokens)


def plan_step(
    queue: Sequence[QueuedRequest],
    admitted: Sequence[AdmittedRequest],
    *,
    free_pages: int,
    passes_in_flight: int,
    residency: AdapterResidency,
    limits: SchedulerLimits,
) -> StepPlan:
    """Plan one step. ``queue`` is in the order of arrival, ``admitted`` in the order of admission."""
    draft = _Draft(free_pages=free_pages, residency=residency, limits=limits)
    draft.plan_decodes(admitted)
    # Whoever was preempted for lack of pages must not be outrun by a newcomer that takes them.
    if not draft.preempt and not draft.starved:
        draft.plan_admissions(queue, len(admitted))
    draft.plan_passes(queue, admitted, limits.max_passes - passes_in_flight)
    return StepPlan(
        evict=tuple(draft.evict),
        preempt=tuple(draft.preempt),
        grow=tuple(draft.grow),
        decode=tuple(draft.decode),
        admit=tuple(draft.admit),
        passes=tuple(draft.passes),
        layers_per_pass=limits.layers_per_step if draft.decode else None,
    )


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A plan in the making; ``free_pages`` counts what its decisions have left."""

    free_pages: int
    residency: AdapterResidency
    limits: SchedulerLimits
    evict: list[int] = field(default_factory=list)
    preempt: list[int] = field(default_factory=list)
    grow: list[int] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    passes: list[PassPlan] = field(default_factory=list)
    starved: bool = False
    reserved: set[int] = field(default_factory=set)

    def is_warm(self, version_id: int | None) -> bool:
        return version_id is None or self.residency.is_landed(version_id)

    def make_room(self, pages: int, needed_version: int | None = None) -> bool:
        """Have at least ``pages`` free, by evicting unused adapters where that is enough and no more than is needed."""
        missing = pages - self.free_pages
        if missing <= 0:
            return True
        keep = {needed_version, *self.evict, *self.reserved}
        candidates = [item for item in self.residency.evictable() if item.version_id not in keep]
        if sum(item.pages for item in candidates) < missing:
            return False
        victims = choose_victims(candidates, missing)
        self.evict.extend(victims)
        self.free_pages += sum(item.pages for item in candidates if item.version_id in victims)
        return True

    def plan_decodes(self, admitted: Sequence[AdmittedRequest]) -> None:
        """Give each request that decodes the page it needs, oldest first, taking pages from the youngest if need be."""
        for position, request in enumerate(admitted):
            decodes = request.computed_tokens == request.tokens - 1
            if request.in_flight or request.number in self.preempt or not decodes:
                continue
            if request.pages * self.limits.page_tokens < request.tokens:
                if not self.make_room(1) and not self._preempt_one(admitted[position + 1 :]):
                    self.starved = True
                    continue
                self.free_pages -= 1
                self.grow.append(request.number)
            if self.is_warm(request.version_id):
                self.decode.append(request.number)

    def _preempt_one(self, younger: Sequence[AdmittedRequest]) -> bool:
        """Preempt the youngest of these requests that can be; False when none can."""
        for victim in reversed(younger):
            if not victim.in_flight and victim.number not in self.preempt:
                self.preempt.append(victim.number)
                self.free_pages += victim.pages
                return True
        return False

    def plan_admissions(self, queue: Sequence[QueuedRequest], admitted_count: int) -> None:
        """Admit from the head of the queue until one does not fit."""
        for request in queue:
            if admitted_count + len(self.admit) >= self.limits.max_running:
                return
            adapter_pages = self._adapter_pages(request.version_id)
            kv_pages = pages_for(request.tokens + 1, self.limits.page_tokens)
            reserve = pages_for(request.tokens, self.limits.page_tokens) + 1
            if not self.make_room(adapter_pages + reserve, request.version_id):
                return
            self.free_pages -= adapter_pages + kv_pages
            if request.version_id is not None:
                self.reserved.add(request.version_id)
            self.admit.append(
                Admission(
                    number=request.number,
                    version_id=request.version_id,
                    kv_pages=kv_pages,
                    adapter_pages=adapter_pages,
                )
            )

    def _adapter_pages(self, version_id: int | None) -> int:
        if version_id is None or version_id in self.reserved:
            return 0
        return self.residency.pages_to_reserve(version_id)

    def plan_passes(
        self, queue: Sequence[QueuedRequest], admitted: Sequence[AdmittedRequest], max_new_passes: int
    ) -> None:
        """Group the rows to compute: those whose adapters have landed together, the others by adapter."""
        queued = {request.number: request for request in queue}
        groups: dict[int | None, list[PassRows]] = {}
        stalled = {*self.preempt, *self.decode}
        for request in admitted:
            needs_page = request.pages * self.limits.page_tokens < request.tokens and request.number not in self.grow
            if request.in_flight or request.number in stalled or needs_page:
                continue
            rows = PassRows(request.number, request.computed_tokens, request.tokens - request.computed_tokens)
            groups.setdefault(self._group(request.version_id), []).append(rows)
        for admission in self.admit:
            rows = PassRows(admission.number, 0, queued[admission.number].tokens)
            groups.setdefault(self._group(admission.version_id), []).append(rows)
        for version_id, members in groups.items():
            if len(self.passes) >= max_new_passes:
                return
            self.passes.append(PassPlan(rows=self._within_budget(members), version_id=version_id))

    def _group(self, version_id: int | None) -> int | None:
        return None if self.is_warm(version_id) else version_id

    def _within_budget(self, members: Sequence[PassRows]) -> tuple[PassRows, ...]:
        """As many rows as one pass may have; what is left waits for a later pass."""
        left = self.limits.budget_tokens
        taken = []
        for rows in members:
            if left == 0:
                break
            count = min(rows.count, left)
            taken.append(PassRows(rows.number, rows.start, count))
            left -= count
        return tuple(taken)
