"""The requests that wait, kept in the orders that a policy asks for, so that a step need not sort them.

Within a tenant those come first that can still meet their target for the first token: by slack, which is the time left
until their prefill must begin. All others are patient, and so are those whose slack is longer than anybody's patience:
they follow in the order of arrival. So that those with targets starve nobody, every fourth admission of a tenant goes
to its longest waiting request once that is overdue. Between tenants see ``TenantShares``. A request that was preempted
waits in the order of arrival, and while it does, all of its tenant do; from its second preemption on it is admitted
before all of the other tenants.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from segue.scheduler.fair_share import PROMPT_TOKEN_WEIGHT, TenantShares
from segue.scheduler.plan import QueuedRequest

# A request that waits for longer is overdue, and of a tenant's admissions one in so many goes to the longest overdue.
PATIENCE_SECONDS = 10.0
OVERDUE_TURN = 4
# One step of priority is worth as much as having waited so much longer. Priorities count up to a bound, so that this is
# a bound as well.
PRIORITY_SECONDS = 10.0
MOST_PRIORITY = 8
# From so many preemptions on, a request is no longer chosen for what it is: it is as under first come, first served.
MOST_PREEMPTIONS = 2

_Key = tuple[float, int]


class _Rank(IntEnum):
    """In which order tenants' next requests are compared: with a target or overdue, without, beyond its share."""

    URGENT = 0
    PATIENT = 1
    BEYOND = 2


def is_pressing(start_by_seconds: float, now: float) -> bool:
    """Whether a prefill that must begin by then is a matter of now."""
    return start_by_seconds - now <= PATIENCE_SECONDS


def priority_seconds(priority: int) -> float:
    """By how much a priority moves a request forward."""
    return PRIORITY_SECONDS * max(-MOST_PRIORITY, min(MOST_PRIORITY, priority))


_Candidate = tuple[_Rank, _Key]
_Entry = tuple[_Rank, float, int, str]


@dataclass(slots=True)
class _TenantLine:
    """One tenant's requests: all of them, and those that can meet a target, each by a key of seconds and the number."""

    patient: list[_Key] = field(default_factory=list)
    urgent: list[_Key] = field(default_factory=list)
    preempted: int = 0
    admissions: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    request: QueuedRequest
    patient: _Key
    urgent: _Key | None


class WaitingLine:
    """All requests of an engine that wait. ``shares`` has what each tenant was served."""

    def __init__(self) -> None:
        self.shares = TenantShares()
        self._numbers: list[int] = []
        self._places: dict[int, _Place] = {}
        self._tenants: dict[str, _TenantLine] = {}
        self._pressing: list[_Key] = []
        self._expiry: list[_Key] = []
        self._protected: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, request: QueuedRequest, start_by_seconds: float = math.inf) -> None:
        """A request waits; to meet its target its prefill must begin by ``start_by_seconds`` (infinite: no target)."""
        level, number = request.level, request.number
        forward = priority_seconds(level.priority)
        patient = (level.queued_seconds - forward, number)
        urgent = None
        if start_by_seconds < math.inf and not request.has_token:
            urgent = (start_by_seconds - forward, number)
            heapq.heappush(self._expiry, (start_by_seconds, number))
        line = self._tenants.setdefault(level.tenant, _TenantLine())
        bisect.insort(line.patient, patient)
        if urgent is not None and is_pressing(start_by_seconds, level.queued_seconds):
            bisect.insort(line.urgent, urgent)
        elif urgent is not None:
            heapq.heappush(self._pressing, (start_by_seconds - PATIENCE_SECONDS, number))
        line.preempted += request.preemptions > 0
        if request.preemptions >= MOST_PREEMPTIONS:
            bisect.insort(self._protected, number)
        bisect.insort(self._numbers, number)
        self._places[number] = _Place(request, patient, urgent)
        self.shares.wait(level.tenant)

    def admit(self, number: int, *, cached_tokens: int = 0) -> None:
        """A request was admitted; the KV of so many of its tokens is there. Raises KeyError for one that does not wait.

        When it gives its pages back, ``shares`` must be told.
        """
        request = self._remove(number)
        tenant = request.level.tenant
        if tenant in self._tenants:
            self._tenants[tenant].admissions += 1
        self.shares.run(tenant)
        if not request.preemptions:
            self.shares.charge(tenant, prompt_tokens=request.tokens - cached_tokens)

    def drop(self, number: int) -> None:
        """A request ended while it waited. Raises KeyError for one that does not wait."""
        self._remove(number)

    def _remove(self, number: int) -> QueuedRequest:
        place = self._places.pop(number)
        tenant = place.request.level.tenant
        line = self._tenants[tenant]
        del self._numbers[bisect.bisect_left(self._numbers, number)]
        _drop(line.patient, place.patient)
        if place.urgent is not None:
            _drop(line.urgent, place.urgent)
        line.preempted -= place.request.preemptions > 0
        if place.request.preemptions >= MOST_PREEMPTIONS:
            self._protected.remove(number)
        if not line.patient:
            del self._tenants[tenant]
        self.shares.stop_waiting(tenant)
        return place.request

    def advance(self, now: float) -> None:
        """Requests whose slack has become short are urgent, and those whose prefill did not begin in time patient."""
        while self._pressing and self._pressing[0][0] <= now:
            _, number = heapq.heappop(self._pressing)
            place = self._places.get(number)
            if place is not None and place.urgent is not None:
                bisect.insort(self._tenants[place.request.level.tenant].urgent, place.urgent)
        while self._expiry and self._expiry[0][0] < now:
            _, number = heapq.heappop(self._expiry)
            place = self._places.get(number)
            if place is not None and place.urgent is not None:
                _drop(self._tenants[place.request.level.tenant].urgent, place.urgent)

    def by_arrival(self) -> Iterator[QueuedRequest]:
        """The requests by their numbers."""
        return (self._places[number].request for number in self._numbers)

    def before(self, tenant: str, start_by_seconds: float, priority: int = 0) -> Iterator[QueuedRequest]:
        """Requests of the tenant that would be admitted before one that has to begin by ``start_by_seconds``."""
        line = self._tenants.get(tenant, _TenantLine())
        patient = line.preempted or start_by_seconds == math.inf
        keys = line.patient if patient else line.urgent
        limit = (math.inf if patient else start_by_seconds - priority_seconds(priority), -1)
        return (self._places[number].request for _, number in keys[: bisect.bisect_left(keys, limit)])

    def order(self, now: float) -> Iterator[QueuedRequest]:
        """The requests in the order in which they are to be admitted, each as if all before it had been.

        ``advance`` comes before. Tenants within the credit of the one with the least service go first, by their
        requests' keys; then the others, by their service.
        """
        # Of one tenant whoever was preempted goes by arrival anyway.
        protected = tuple(self._protected) if len(self._tenants) > 1 else ()
        taken = set(protected)
        yield from (self._places[number].request for number in protected)
        lines = self._tenants
        served = {tenant: self.shares.counters[tenant] for tenant in lines}
        level = min(served.values(), default=0) + self.shares.credit_tokens
        overdue_before = now - PATIENCE_SECONDS
        heap: list[_Entry] = []
        following: dict[str, Iterator[_Candidate]] = {}
        for tenant, line in lines.items():
            if taken:
                following[tenant] = _candidates(line, overdue_before, taken)
                first = next(following[tenant], None)
            else:
                first = _first(line, overdue_before)
            if first is not None:
                heap.append(_entry(first, tenant, served[tenant], level))
        heapq.heapify(heap)
        while heap:
            _, _, number, tenant = heap[0]
            request = self._places[number].request
            yield request
            if not request.preemptions:
                served[tenant] += PROMPT_TOKEN_WEIGHT * request.tokens
            if tenant not in following:
                following[tenant] = _candidates(lines[tenant], overdue_before, taken)
                next(following[tenant])
            candidate = next(following[tenant], None)
            if candidate is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, _entry(candidate, tenant, served[tenant], level))

    def check(self, waiting: Iterable[int]) -> None:
        """Raise AssertionError unless exactly these requests wait, in orders that agree with them."""
        numbers: set[int] = set()
        for tenant, line in self._tenants.items():
            assert line.patient == sorted(line.patient), f"{tenant!r}: out of order"
            assert line.urgent == sorted(line.urgent), f"{tenant!r}: out of order"
            own = {number for _, number in line.patient}
            assert {number for _, number in line.urgent} <= own, f"{tenant!r}: urgent and not there"
            preempted = sum(self._places[number].request.preemptions > 0 for number in own)
            assert line.preempted == preempted, f"{tenant!r}: {line.preempted} preempted, {preempted} are there"
            numbers |= own
        assert self._numbers == sorted(numbers), "the order of arrival"
        self.shares.check()
        assert numbers == set(self._places) == set(waiting), "a request is in no line, or in one too many"
        assert self._protected == sorted(self._protected), "protected requests are out of order"
        assert set(self._protected) <= numbers, "a protected request does not wait"


def _drop(keys: list[_Key], key: _Key) -> None:
    place = bisect.bisect_left(keys, key)
    if place < len(keys) and keys[place] == key:
        del keys[place]


def _entry(candidate: _Candidate, tenant: str, served: int, level: int) -> _Entry:
    rank, (seconds, number) = candidate
    return (_Rank.BEYOND, served, number, tenant) if served >= level else (rank, seconds, number, tenant)


def _first(line: _TenantLine, overdue_before: float) -> _Candidate:
    """The first of ``_candidates`` where none is taken."""
    overdue = line.patient[0][0] <= overdue_before and line.admissions % OVERDUE_TURN == 0
    if overdue or line.preempted or not line.urgent:
        return (_Rank.URGENT if overdue else _Rank.PATIENT, line.patient[0])
    return (_Rank.URGENT, line.urgent[0])


def _candidates(line: _TenantLine, overdue_before: float, taken: set[int]) -> Iterator[_Candidate]:
    """A tenant's requests in the order of admission, but for those that are taken."""
    urgent: Sequence[_Key] = () if line.preempted else line.urgent
    given = set(taken)
    at_urgent = at_patient = 0
    turn = line.admissions
    while True:
        while at_patient < len(line.patient) and line.patient[at_patient][1] in given:
            at_patient += 1
        while at_urgent < len(urgent) and urgent[at_urgent][1] in given:
            at_urgent += 1
        if at_patient == len(line.patient):
            return
        oldest = line.patient[at_patient]
        overdue = oldest[0] <= overdue_before and turn % OVERDUE_TURN == 0
        if at_urgent < len(urgent) and not overdue:
            chosen = (_Rank.URGENT, urgent[at_urgent])
        else:
            chosen = (_Rank.URGENT if overdue else _Rank.PATIENT, oldest)
        given.add(chosen[1][1])
        turn += 1
        yield chosen
