"""What the scheduler is shown of the engine before a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from segue.engine.costs import EngineCosts
from segue.engine.forward_pass import ForwardPass
from segue.engine.kv import KvPages
from segue.engine.memory.pool import PagePool
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.scheduler.batch import plan_step
from segue.scheduler.plan import AdmittedRequest, CpuService, SchedulerLimits, StepPlan
from segue.scheduler.policy import PolicyName, step_order


class StepPlanner:
    """Asks the scheduler for a plan, with what is under way taken as done.

    ``most_adapters``: see SloPolicy.
    """

    def __init__(
        self,
        *,
        requests: RequestTable,
        kv: KvPages,
        residency: Residency,
        pool: PagePool,
        limits: SchedulerLimits,
        policy: PolicyName,
        costs: EngineCosts,
        most_adapters: int | None,
        clock: Callable[[], float],
        cpu: CpuService | None = None,
    ) -> None:
        self._requests = requests
        self._kv = kv
        self._residency = residency
        self._pool = pool
        self._limits = limits
        self._policy = policy
        self._costs = costs
        self._most_adapters = most_adapters
        self._clock = clock
        self._cpu = cpu

    def plan(self, passes: Sequence[ForwardPass], idle_sets: int | None) -> StepPlan:
        """The next step, while ``passes`` have not ended; ``idle_sets``: see ``PassRunner.idle_sets``."""
        queue, policy = step_order(
            self._policy,
            self._requests.waiting,
            now=self._clock(),
            profile=self._costs.measured,
            most_adapters=self._most_adapters,
        )
        return plan_step(
            queue,
            [self._admitted(item) for item in self._requests.admitted if item.state is RequestState.ADMITTED],
            free_pages=self._pool.free_pages,
            passes_in_flight=counted_passes(
                len(passes), sum(item.is_held_up for item in passes), idle_sets, self._limits.max_passes
            ),
            residency=self._residency,
            prefixes=self._kv,
            limits=self._limits,
            policy=policy,
            cpu=self._cpu,
        )

    def _admitted(self, request: Request) -> AdmittedRequest:
        generated_tokens = request.generated_tokens + request.ahead_tokens
        left = self._costs.expected_left(generated_tokens, request.submit.max_tokens)
        return admitted_view(request, self._kv, left)


def counted_passes(under_way: int, held_up: int, idle_sets: int | None, max_passes: int) -> int:
    """How many passes a plan must think are under way, of which there are at most ``max_passes``.

    A pass that is not recorded costs the loop several times its own time on the device. So those for which there is no
    set wait for one, unless all sets are with passes that weights do not come for.
    """
    if idle_sets is None or (idle_sets == 0 and held_up == under_way):
        return under_way
    return max(under_way, max_passes - idle_sets)


def admitted_view(request: Request, kv: KvPages, expected_tokens: int = 1) -> AdmittedRequest:
    """What the scheduler sees of a request that holds pages, and of which so many more tokens are expected."""
    return AdmittedRequest(
        number=request.number,
        tokens=request.planned_tokens,
        computed_tokens=request.planned_computed_tokens,
        pages=len(request.pages),
        own_pages=len(request.pages) - len(request.path),
        sole_pages=kv.sole_pages(request),
        version_id=request.version_id,
        in_flight=request.is_busy,
        level=request.level,
        generated_tokens=request.generated_tokens,
        first_token_seconds=request.timeline.first_token_seconds,
        preemptions=request.preemptions,
        cpu_allowed=request.cpu_allowed,
        expected_tokens=expected_tokens,
    )
