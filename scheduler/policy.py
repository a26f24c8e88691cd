"""How requests compete for a step: who is preempted, whose prompt is computed first, and how much prefill a step takes.

``FirstCome`` is first come, first served, with a fixed number of prompt rows beside decodes. ``SloPolicy`` goes by
targets: the order of admission is the WaitingLine's; prompts follow by slack; and a step takes as many of their rows as
the cost model says the running requests' time per token allows. Without targets and with one tenant both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.plan import AdmittedRequest, PassRows, QueuedRequest, SchedulerLimits, ServiceLevel
from segue.scheduler.waiting import MOST_PREEMPTIONS, PATIENCE_SECONDS, WaitingLine, is_pressing, priority_seconds

# Steps are planned for so much of a target: passes of loading adapters and the model's error take the rest.
_PLANNED_SHARE = 0.9
# Of the time that a request is ahead of its target, one step takes at most this share.
_SPENT_SHARE = 0.5
# A request that is behind its target catches up over so many tokens.
_CATCH_UP_TOKENS = 16

# One place in so many is not given to tenants that have a surplus.
_RESERVED_PLACES = 8


class PolicyName(StrEnum):
    """The policies that an engine can be told to follow."""

    SLO = "slo"
    FCFS = "fcfs"


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a prompt that could run now. ``oldest``: of all admitted requests it was admitted first."""

    rows: PassRows
    version_id: int | None
    level: ServiceLevel
    oldest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRoom:
    """What one more request would find: ``places`` that are left, the ``adapters`` of those that are admitted, and
    their ``prompt_tokens`` that have not been computed."""

    places: int
    adapters: Collection[int]
    prompt_tokens: int


class StepPolicy(Protocol):
    """What a step asks of a policy. All answers depend on the arguments and on the time it was made for."""

    def victims(self, younger: Sequence[AdmittedRequest]) -> Iterable[AdmittedRequest]:
        """These requests, in the order of admission, in the order in which they are to be preempted."""
        ...

    def prompt_order(self, prompts: Sequence[PromptRows]) -> Sequence[PromptRows]:
        """These prompts, in the order of admission, in the order in which they are to be computed."""
        ...

    def prompt_tokens(
        self, decodes: Sequence[AdmittedRequest], prompts: Sequence[PromptRows], limits: SchedulerLimits
    ) -> int:
        """How many rows of these prompts, in this order, a step takes beside requests that decode, at least one."""
        ...

    def keeps_out(self, request: QueuedRequest, room: AdmissionRoom, limits: SchedulerLimits) -> bool:
        """Whether a request has to wait though it may be its turn. Those behind it then do not wait for it."""
        ...


@dataclass(frozen=True, slots=True)
class FirstCome:
    """First come, first served."""

    def victims(self, younger: Sequence[AdmittedRequest]) -> Iterable[AdmittedRequest]:
        return reversed(younger)

    def prompt_order(self, prompts: Sequence[PromptRows]) -> Sequence[PromptRows]:
        return prompts

    def prompt_tokens(
        self, _decodes: Sequence[AdmittedRequest], _prompts: Sequence[PromptRows], limits: SchedulerLimits
    ) -> int:
        return limits.chunk_tokens

    def keeps_out(self, _request: QueuedRequest, _room: AdmissionRoom, _limits: SchedulerLimits) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class SloPolicy:
    """By targets, at the time ``now``.

    ``surplus`` are tenants that have been served more than others who ask for service now, and ``floods`` those that
    ask for many times as much as others, of ``tenants`` with requests. ``profile`` is what steps cost; without one a
    step takes the fixed number of rows. ``most_adapters``: admit requests for so many adapters at a
    time and no others, until those are done or have waited ``patience_seconds`` (S-LoRA's clustering, Sheng et al.,
    MLSys 2024, arXiv:2311.03285, section 4.2).
    """

    now: float
    surplus: frozenset[str] = field(default_factory=frozenset)
    floods: frozenset[str] = field(default_factory=frozenset)
    tenants: int = 1
    profile: CostProfile | None = None
    most_adapters: int | None = None
    patience_seconds: float = 1.0

    def victims(self, younger: Sequence[AdmittedRequest]) -> Iterable[AdmittedRequest]:
        """Tenants with a surplus first, then the least priority, then those without a target that they still meet; the
        youngest of equals. One that was preempted twice counts as the best of all: then its age alone decides."""
        merits = {
            item.number: (item.level.tenant not in self.surplus, item.level.priority, self._is_on_time(item))
            for item in younger
            if item.preemptions < MOST_PREEMPTIONS
        }
        best = max(merits.values(), default=(True, 0, False))
        youngest_first = tuple(reversed(younger))
        return sorted(youngest_first, key=lambda item: merits.get(item.number, best))

    def prompt_order(self, prompts: Sequence[PromptRows]) -> Sequence[PromptRows]:
        """The oldest request first: it always goes on. Then by tenant and slack, those that are late last.

        A flood's are last even while it has no surplus: what it was kept from before it does not make others wait.
        """
        last = self.surplus | self.floods

        def key(item: PromptRows) -> tuple[bool, bool, float]:
            by_seconds = item.level.first_token_by_seconds
            start_by = by_seconds - prompt_seconds(self.profile, item.rows.count, item.rows.start, item.level)
            urgent = start_by >= self.now and is_pressing(start_by, self.now)
            forward = priority_seconds(item.level.priority)
            return (item.level.tenant in last, not urgent, start_by - forward if urgent else -forward)

        return sorted(prompts, key=lambda item: (not item.oldest, *(key(item) if not item.oldest else ())))

    def prompt_tokens(
        self, decodes: Sequence[AdmittedRequest], prompts: Sequence[PromptRows], limits: SchedulerLimits
    ) -> int:
        """As many as end before the first of the running requests falls behind its time per token.

        At least a page, so that a prompt is never kept out. Where nobody has a target the fixed number. While others
        decode, a flood that has a surplus has an equal part of the rows that the others' prompts leave, or a page: each
        row of it makes everybody's tokens later.
        """
        rows = self._rows_in_time(decodes, prompts, limits)
        floods = self.floods & self.surplus
        if not floods or all(item.level.tenant in floods for item in decodes):
            return rows
        of_others = sum(item.rows.count for item in prompts if item.level.tenant not in floods)
        equal_part = (rows - of_others) * len(floods) // self.tenants
        return min(rows, of_others + max(limits.page_tokens, equal_part))

    def _rows_in_time(
        self, decodes: Sequence[AdmittedRequest], prompts: Sequence[PromptRows], limits: SchedulerLimits
    ) -> int:
        """How many rows of these prompts a step takes for the sake of the running requests' targets."""
        levels = (*(item.level for item in decodes), *(item.level for item in prompts))
        has_target = any(level.token_seconds < math.inf for level in levels) or any(
            is_pressing(item.level.first_token_by_seconds, self.now) for item in prompts
        )
        if self.profile is None or not has_target:
            return limits.chunk_tokens
        most = max(limits.chunk_tokens, limits.budget_tokens - len(decodes))
        load = decode_load(decodes)
        allowed = min((self._allowed_seconds(item, load) for item in decodes), default=math.inf)
        return max(min(limits.page_tokens, most), _tokens_within(self.profile, allowed, load, prompts, most))

    def keeps_out(self, request: QueuedRequest, room: AdmissionRoom, limits: SchedulerLimits) -> bool:
        """Whether its adapter is one too many, or its tenant has a surplus and would take what others need at once: the
        last places, or those of prompts that a step has no rows for anyway. So is a flood's without a surplus, until it
        has waited for as long as patience lasts."""
        tenant, waited = request.level.tenant, self.now - request.level.queued_seconds
        yields = tenant in self.surplus or (tenant in self.floods and waited < PATIENCE_SECONDS)
        if yields and not request.preemptions:
            reserved = max(1, limits.max_running // _RESERVED_PLACES)
            return room.places <= reserved or room.prompt_tokens >= limits.budget_tokens
        if self.most_adapters is None or request.version_id in room.adapters or request.version_id is None:
            return False
        return len(room.adapters) >= self.most_adapters and waited < self.patience_seconds

    def _is_on_time(self, request: AdmittedRequest) -> bool:
        """Whether it has a target and has not missed it yet."""
        if request.first_token_seconds is None:
            return self.now <= request.level.first_token_by_seconds < math.inf
        return request.level.token_seconds < math.inf and self._ahead_seconds(request) >= 0

    def _ahead_seconds(self, request: AdmittedRequest) -> float:
        """By how much the last token came before its time, taking it to come now."""
        assert request.first_token_seconds is not None
        later_tokens = max(0, request.generated_tokens - 1)
        planned_seconds = _PLANNED_SHARE * request.level.token_seconds * later_tokens
        return request.first_token_seconds + planned_seconds - self.now

    def _allowed_seconds(self, request: AdmittedRequest, load: StepLoad) -> float:
        """How long the next step may take for this request. Infinite where that makes no difference to it any more."""
        target = _PLANNED_SHARE * request.level.token_seconds
        if target == math.inf:
            return math.inf
        if request.first_token_seconds is None:
            return target
        ahead = self._ahead_seconds(request)
        if ahead >= 0:
            return target + _SPENT_SHARE * ahead
        assert self.profile is not None
        lost = -ahead > request.tokens * max(0.0, target - self.profile.decode_seconds(load))
        return math.inf if lost else target + ahead / _CATCH_UP_TOKENS


def step_order(
    name: PolicyName,
    line: WaitingLine,
    *,
    now: float,
    profile: CostProfile | None = None,
    most_adapters: int | None = None,
) -> tuple[Iterator[QueuedRequest], StepPolicy]:
    """The queue of a step in the order of admission, of which no more is made than is read, and its policy."""
    if name is PolicyName.FCFS:
        return line.by_arrival(), FirstCome()
    line.advance(now)
    policy = SloPolicy(
        now=now,
        surplus=line.shares.surplus(),
        floods=line.shares.floods(),
        tenants=line.shares.tenants,
        profile=profile,
        most_adapters=most_adapters,
    )
    return line.order(now), policy


def prompt_seconds(profile: CostProfile | None, tokens: int, start: int, level: ServiceLevel) -> float:
    """What computing so many tokens of a prompt behind ``start`` others takes, 0 where that is not known."""
    if profile is None or tokens == 0:
        return 0.0
    return profile.prefill_seconds(prompt_load(tokens, start, level))


def prompt_load(tokens: int, start: int, level: ServiceLevel) -> StepLoad:
    """So many rows of a prompt, of which ``start`` tokens have KV."""
    context = tokens * start + tokens * (tokens + 1) // 2
    adapter = level.adapter
    if adapter is None:
        return StepLoad(tokens=tokens, context_tokens=context)
    return StepLoad(
        tokens=tokens,
        context_tokens=context,
        adapters=1,
        adapter_bytes=adapter.weight_bytes,
        max_rank=adapter.rank,
        rank_tokens=tokens * adapter.rank,
    )


def decode_load(requests: Sequence[AdmittedRequest]) -> StepLoad:
    """The step in which these requests decode."""
    adapters = {item.level.adapter.version_id: item.level.adapter for item in requests if item.level.adapter}
    return StepLoad(
        tokens=len(requests),
        context_tokens=sum(item.tokens for item in requests),
        adapters=len(adapters),
        adapter_bytes=sum(item.weight_bytes for item in adapters.values()),
        max_rank=max((item.rank for item in adapters.values()), default=0),
        rank_tokens=sum(item.level.adapter.rank for item in requests if item.level.adapter),
    )


def _tokens_within(
    profile: CostProfile, seconds: float, decodes: StepLoad, prompts: Sequence[PromptRows], most: int
) -> int:
    """Rows of prompts, in this order and at most so many, that a step of ``seconds`` computes beside the decodes."""
    load, taken = StepLoad(), 0
    for item in prompts:
        count = min(item.rows.count, most - taken)
        whole = load.joined(prompt_load(count, item.rows.start, item.level))
        if count == 0:
            break
        if profile.step_seconds(decodes, whole) <= seconds:
            load, taken = whole, taken + count
            continue
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            part = load.joined(prompt_load(middle, item.rows.start, item.level))
            low, high = (middle, high) if profile.step_seconds(decodes, part) <= seconds else (low, middle)
        return taken + low
    return taken
