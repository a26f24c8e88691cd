"""What the scheduler is shown of the engine before a step."""

from __future__ import annotations

from segue.engine.kv import KvPages
from segue.engine.memory.pool import PagePool
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.scheduler.batch import plan_step
from segue.scheduler.plan import AdmittedRequest, CpuService, QueuedRequest, SchedulerLimits, StepPlan


class StepPlanner:
    """Asks the scheduler for a plan, with what is under way taken as done."""

    def __init__(
        self,
        requests: RequestTable,
        kv: KvPages,
        residency: Residency,
        pool: PagePool,
        limits: SchedulerLimits,
        cpu: CpuService | None,
    ) -> None:
        self._requests = requests
        self._kv = kv
        self._residency = residency
        self._pool = pool
        self._limits = limits
        self._cpu = cpu

    def plan(self, passes_in_flight: int) -> StepPlan:
        """The next step, while ``passes_in_flight`` passes have not ended."""
        return plan_step(
            map(_queued, self._requests.queue),
            [self._admitted(item) for item in self._requests.admitted if item.state is RequestState.ADMITTED],
            free_pages=self._pool.free_pages,
            passes_in_flight=passes_in_flight,
            residency=self._residency,
            prefixes=self._kv,
            limits=self._limits,
            cpu=self._cpu,
        )

    def _admitted(self, request: Request) -> AdmittedRequest:
        return AdmittedRequest(
            number=request.number,
            tokens=request.planned_tokens,
            computed_tokens=request.planned_computed_tokens,
            pages=len(request.pages),
            own_pages=len(request.own_pages),
            sole_pages=self._kv.sole_pages(request),
            version_id=request.version_id,
            in_flight=request.is_busy,
            cpu_allowed=request.cpu_allowed,
            remaining_tokens=request.submit.max_tokens - request.generated_tokens - request.ahead_tokens,
        )


def _queued(request: Request) -> QueuedRequest:
    return QueuedRequest(
        number=request.number,
        tokens=len(request.token_ids),
        version_id=request.version_id,
        cpu_allowed=request.cpu_allowed,
    )
