"""What the scheduler sees of an engine before a step, and the plan that it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from segue.scheduler.eviction import EvictionCandidate
from segue.scheduler.placement import AdapterCost


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """What a request is promised, and on whose account. Seconds are of the engine's clock.

    ``first_token_by_seconds`` and ``token_seconds`` (the mean time per token after the first) are infinite without a
    target. ``queued_seconds`` is when the engine took the request. ``adapter`` says what its adapter costs.
    """

    tenant: str = ""
    priority: int = 0
    first_token_by_seconds: float = math.inf
    token_seconds: float = math.inf
    queued_seconds: float = 0.0
    adapter: AdapterCost | None = None


NO_LEVEL = ServiceLevel()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """A request that holds no pages. ``tokens`` counts its prompt and what it had generated before a preemption.

    ``has_token``: its first token was sent before it was preempted, which happened ``preemptions`` times.
    ``cpu_allowed`` is False after CPU workers failed it too often.
    """

    number: int
    tokens: int
    version_id: int | None
    level: ServiceLevel = NO_LEVEL
    has_token: bool = False
    preemptions: int = 0
    cpu_allowed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedRequest:
    """A request that holds pages. Its KV covers ``computed_tokens`` of its ``tokens``.

    Of its ``pages``, ``own_pages`` come free when it is preempted, and ``sole_pages`` are shared prefixes that no other
    request uses: they become idle then. ``in_flight``: some of its rows are in a pass that has not ended, so it can
    neither be given rows nor be preempted. ``generated_tokens`` of its answer have come, the first of them at
    ``first_token_seconds``; ``expected_tokens`` more are expected. ``cpu_allowed`` is False after CPU workers failed it
    too often.
    """

    number: int
    tokens: int
    computed_tokens: int
    pages: int
    own_pages: int
    sole_pages: int
    version_id: int | None
    in_flight: bool
    level: ServiceLevel = NO_LEVEL
    generated_tokens: int = 0
    first_token_seconds: float | None = None
    preemptions: int = 0
    cpu_allowed: bool = True
    expected_tokens: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixMatch:
    """Pages of KV that a queued request need not compute.

    The first ``pages`` of its KV are there; those in ``idle`` of them, by their ids, are used by no request now. The
    next ``pending_pages`` will be computed by requests that arrived before it.
    """

    pages: int = 0
    idle: frozenset[int] = frozenset()
    pending_pages: int = 0


class AdapterResidency(Protocol):
    """What the scheduler must see of the adapters."""

    def pages_to_reserve(self, version_id: int) -> int:
        """Pages that the adapter still needs: 0 when it has been given its pages."""
        ...

    def is_warm(self, version_id: int) -> bool:
        """Whether all layers are on the device and known to be right."""
        ...

    def is_in_host(self, version_id: int) -> bool:
        """Whether all layers can be copied to the device now, and are known to be right."""
        ...

    def evictable(self) -> Sequence[EvictionCandidate]:
        """Adapters whose pages no admitted request, copy or step refers to."""
        ...


class CpuService(Protocol):
    """CPU workers that serve adapters without pages, and what that takes."""

    def pass_seconds(self, version_id: int, tokens: int, step_seconds: float) -> float:
        """Seconds of a pass of so many rows of which they compute all deltas, between steps that take
        ``step_seconds``; infinite where they cannot, now or when the adapter has been read."""
        ...

    def step_seconds(self, requests: int) -> float:
        """Seconds of a step in which so many requests decode."""
        ...

    def held_pages(self, version_id: int) -> int:
        """Pages that the adapter has."""
        ...


class PrefixPages(Protocol):
    """What the scheduler must see of the KV pages that are kept for reuse."""

    @property
    def idle_pages(self) -> int:
        """Pages that no request uses; they can be given up in an order of their own."""
        ...

    def idle_candidates(self, count: int) -> Sequence[EvictionCandidate]:
        """The first ``count`` of the idle pages in that order, or all; ids below 0 tell them from adapters."""
        ...

    def match(self, number: int) -> PrefixMatch:
        """What is there of a queued request's prefix."""
        ...


LEAST_PASS_LAYERS = 2
"""A pass goes on so far in each step, whatever else there is to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of a step: see EngineConfig for their meaning and units."""

    page_tokens: int
    max_running: int
    max_passes: int
    budget_tokens: int
    chunk_tokens: int
    layers_per_step: int | None
    merged_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request to admit: the first pages of its KV that are there already, the KV pages to give it besides, and the
    pages to give its adapter (0: it has them, needs none, or is served by the CPU until there are some)."""

    number: int
    version_id: int | None
    cached_pages: int
    kv_pages: int
    adapter_pages: int


@dataclass(frozen=True, slots=True)
class AdapterPages:
    """Pages to give an adapter that the CPU alone has served so far."""

    version_id: int
    pages: int


@dataclass(frozen=True, slots=True)
class PassRows:
    """Rows of one request in a pass: its tokens ``start`` to ``start + count``."""

    number: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPlan:
    """A pass to start for rows of adapters that are still loading, or of one that has no pages."""

    rows: tuple[PassRows, ...]
    version_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The decisions of one step.

    Requests in ``preempt`` give their pages back, adapters in ``evict`` theirs, and ``reclaim_pages`` idle pages are
    given up, after the admitted requests have taken hold of those they share. ``grow`` names requests that get one
    more page. ``adapters`` go over from the CPU to the device. ``batch`` runs to its end in this step: the rows that
    decode, then rows of prompts whose adapters are warm. ``layers_per_pass`` is how far each pass advances; or it may
    compute ``rows_per_pass`` rows through all layers, or as much of its own rows, see ``most_layers``. With neither it
    goes as far as it can.
    """

    evict: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()
    reclaim_pages: int = 0
    grow: tuple[int, ...] = ()
    adapters: tuple[AdapterPages, ...] = ()
    admit: tuple[Admission, ...] = ()
    batch: tuple[PassRows, ...] = ()
    passes: tuple[PassPlan, ...] = ()
    layers_per_pass: int | None = None
    rows_per_pass: int | None = None

    @property
    def bounds_passes(self) -> bool:
        """Whether passes may not go as far as they can."""
        return self.layers_per_pass is not None or self.rows_per_pass is not None

    def most_layers(self, *, rows: int, layers: int) -> int | None:
        """How many of its ``layers`` layers a pass of so many rows advances; None: as many as it can."""
        if self.layers_per_pass is not None or self.rows_per_pass is None:
            return self.layers_per_pass
        return max(LEAST_PASS_LAYERS, layers * self.rows_per_pass // rows)


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that the KV of ``tokens`` tokens fills."""
    return -(-tokens // page_tokens)
