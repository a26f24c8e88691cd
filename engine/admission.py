"""Whether the engine takes a request, and what it promises it."""

from __future__ import annotations

import math
from collections.abc import Callable

from segue.engine.costs import EngineCosts
from segue.engine.kv import KvPages
from segue.engine.memory.pool import PagePool
from segue.engine.messages import Submit
from segue.engine.planner import admitted_view
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.engine.versions import AdapterVersions
from segue.errors import InvalidRequestError, OverloadedError, SegueError, SloInfeasibleError
from segue.scheduler.plan import SchedulerLimits, ServiceLevel, pages_for
from segue.scheduler.refusal import EngineLoad, Running, refusal


class AdmissionControl:
    """Refuses what could never fit, what would overfill the queue, and what would rather be refused than late.

    ``max_waiting`` bounds the queue of all, and a tenant may have ``tenant_share`` of it.
    """

    def __init__(
        self,
        *,
        requests: RequestTable,
        versions: AdapterVersions,
        residency: Residency,
        kv: KvPages,
        pool: PagePool,
        limits: SchedulerLimits,
        costs: EngineCosts,
        max_waiting: int,
        tenant_share: float,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._versions = versions
        self._residency = residency
        self._kv = kv
        self._pool = pool
        self._limits = limits
        self._costs = costs
        self._max_waiting = max_waiting
        self._max_of_tenant = max(1, math.floor(max_waiting * tenant_share))
        self._clock = clock

    def request(self, submit: Submit) -> Request | SegueError:
        """The request that is to be queued, or why it is not."""
        version_id = submit.adapter_version_id
        error = None if version_id is None else self._versions.refusal(version_id)
        error = error or self._page_refusal(submit) or self._queue_refusal(submit.tenant)
        if error is not None:
            return error
        request = Request.of(submit, self._level(submit))
        return (self._late_refusal(request) if submit.reject_on_miss else None) or request

    def pages_needed(self, submit: Submit) -> int:
        """Pages that the request may come to need for its KV and its adapter, and one more."""
        tokens = len(submit.prompt_token_ids) + submit.max_tokens
        return self._versions.pages_needed(submit.adapter_version_id, pages_for(tokens, self._limits.page_tokens) + 1)

    def _page_refusal(self, submit: Submit) -> SegueError | None:
        needed = self.pages_needed(submit)
        room = self._pool.pages - self._versions.pinned_pages
        if needed <= room:
            return None
        return InvalidRequestError(
            f"the request needs {needed} pages for its KV and its adapter; the pool has {room} for all but the "
            f"pinned adapters"
        )

    def _queue_refusal(self, tenant: str) -> SegueError | None:
        shares = self._requests.waiting.shares
        if shares.may_wait(tenant, self._max_waiting, self._max_of_tenant):
            return None
        own = shares.waiting.get(tenant, 0)
        if own >= self._max_of_tenant and len(self._requests.queue) < self._max_waiting:
            return OverloadedError(f"{own} requests of this tenant are waiting already, which is its quota")
        return OverloadedError(f"{len(self._requests.queue)} requests are waiting already")

    def _level(self, submit: Submit) -> ServiceLevel:
        first_token_by = math.inf if submit.ttft_seconds is None else submit.arrival_seconds + submit.ttft_seconds
        deadline = math.inf if submit.deadline_seconds is None else submit.deadline_seconds
        return ServiceLevel(
            tenant=submit.tenant,
            priority=submit.priority,
            first_token_by_seconds=min(first_token_by, deadline),
            token_seconds=math.inf if submit.tpot_seconds is None else submit.tpot_seconds,
            queued_seconds=self._clock(),
            adapter=self._versions.cost(submit.adapter_version_id),
        )

    def _late_refusal(self, request: Request) -> SegueError | None:
        """Nothing is predicted before there is a profile or a measurement to go by."""
        profile = self._costs.profile
        if profile is None:
            return None
        level = request.level
        running = [
            Running(
                request=admitted_view(item, self._kv),
                tokens_left=self._costs.expected_left(item.generated_tokens, item.submit.max_tokens),
            )
            for item in self._requests.admitted
            if item.state is RequestState.ADMITTED
        ]
        self._requests.waiting.advance(level.queued_seconds)
        queued = request.queued_view()
        before = self._requests.before(queued, self._costs.start_by(queued))
        copy_bytes = 0
        if level.adapter is not None and not self._residency.is_warm(level.adapter.version_id):
            copy_bytes = level.adapter.weight_bytes
        found = refusal(
            queued,
            EngineLoad(running=running, before=before, room_pages=self._room_pages()),
            profile,
            self._limits,
            now=level.queued_seconds,
            arrival_seconds=request.submit.arrival_seconds,
            copy_bytes=copy_bytes,
        )
        if found is None:
            return None
        if found.retry_after_seconds is None:
            return SloInfeasibleError(found.message)
        return OverloadedError(found.message, retry_after_seconds=found.retry_after_seconds)

    def _room_pages(self) -> int:
        evictable = sum(item.pages for item in self._residency.evictable())
        return self._pool.free_pages + self._kv.idle_pages + evictable
