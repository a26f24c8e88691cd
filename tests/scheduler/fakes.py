"""What stands for an engine in tests of the scheduler: adapters, prefixes, and a world that carries plans out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from segue.scheduler.batch import plan_step
from segue.scheduler.eviction import EvictionCandidate
from segue.scheduler.plan import AdmittedRequest, PrefixMatch, QueuedRequest, SchedulerLimits, StepPlan
from segue.scheduler.policy import FirstCome, StepPolicy

FIRST_COME = FirstCome()
LIMITS = SchedulerLimits(
    page_tokens=4, max_running=8, max_passes=4, budget_tokens=16, chunk_tokens=6, layers_per_step=2
)


@dataclass
class FakeResidency:
    """Adapters as the scheduler sees them: the pages that each needs, and those of each that is resident."""

    needs: dict[int, int] = field(default_factory=dict)
    resident: set[int] = field(default_factory=set)
    warm: set[int] = field(default_factory=set)
    in_use: set[int] = field(default_factory=set)
    in_host: set[int] = field(default_factory=set)

    def pages_to_reserve(self, version_id: int) -> int:
        return 0 if version_id in self.resident else self.needs[version_id]

    def is_warm(self, version_id: int) -> bool:
        return version_id in self.warm

    def is_in_host(self, version_id: int) -> bool:
        return version_id in self.in_host

    def evictable(self) -> Sequence[EvictionCandidate]:
        return [
            EvictionCandidate(
                version_id=version_id,
                pages=self.needs[version_id],
                bring_back_seconds=1.0,
                recent_uses=1.0,
                idle_seconds=1.0 + version_id,
            )
            for version_id in sorted(self.warm - self.in_use)
        ]


@dataclass
class FakeCpuService:
    """Workers that serve these adapters, all passes in the same time, beside steps of one second."""

    versions: set[int] = field(default_factory=set)
    seconds: float = 0.0
    held: dict[int, int] = field(default_factory=dict)

    def pass_seconds(self, version_id: int, tokens: int, step_seconds: float) -> float:
        assert tokens > 0
        assert step_seconds in (0.0, 1.0)
        return self.seconds if version_id in self.versions else math.inf

    def step_seconds(self, requests: int) -> float:
        assert requests >= 0
        return 1.0

    def held_pages(self, version_id: int) -> int:
        return self.held.get(version_id, 0)


@dataclass
class FakePrefixes:
    """Idle pages that are each worth ``page_seconds``, and what is there of each queued request's prefix."""

    idle_pages: int = 0
    page_seconds: float = 0.1
    matches: dict[int, PrefixMatch] = field(default_factory=dict)

    def idle_candidates(self, count: int) -> Sequence[EvictionCandidate]:
        return [
            EvictionCandidate(
                version_id=-1 - index, pages=1, bring_back_seconds=self.page_seconds, recent_uses=1.0, idle_seconds=0.0
            )
            for index in range(min(count, self.idle_pages))
        ]

    def match(self, number: int) -> PrefixMatch:
        return self.matches.get(number, PrefixMatch())


def queued(number: int, tokens: int = 4, version_id: int | None = None) -> QueuedRequest:
    return QueuedRequest(number=number, tokens=tokens, version_id=version_id)


def admitted(
    number: int,
    tokens: int,
    *,
    pages: int,
    computed_tokens: int = 0,
    version_id: int | None = None,
    in_flight: bool = False,
    sole_pages: int = 0,
    shared_pages: int = 0,
) -> AdmittedRequest:
    """Of its pages, ``sole_pages`` are shared with nobody now and ``shared_pages`` with others."""
    return AdmittedRequest(
        number=number,
        tokens=tokens,
        computed_tokens=computed_tokens,
        pages=pages,
        own_pages=pages - sole_pages - shared_pages,
        sole_pages=sole_pages,
        version_id=version_id,
        in_flight=in_flight,
    )


def decoding(number: int, tokens: int, pages: int, version_id: int | None = None) -> AdmittedRequest:
    return admitted(number, tokens, pages=pages, computed_tokens=tokens - 1, version_id=version_id)


def plan(
    queue: Iterable[QueuedRequest] = (),
    running: Sequence[AdmittedRequest] = (),
    *,
    free_pages: int = 100,
    residency: FakeResidency | None = None,
    prefixes: FakePrefixes | None = None,
    passes_in_flight: int = 0,
    cpu: FakeCpuService | None = None,
    limits: SchedulerLimits = LIMITS,
    policy: StepPolicy = FIRST_COME,
) -> StepPlan:
    return plan_step(
        queue,
        running,
        free_pages=free_pages,
        passes_in_flight=passes_in_flight,
        residency=residency or FakeResidency(),
        prefixes=prefixes or FakePrefixes(),
        limits=limits,
        policy=policy,
        cpu=cpu,
    )
