"""The engine: takes messages, carries out the scheduler's plan step by step, and says what each step brought.

All of it runs on one thread. Copies, disk reads and CPU LoRA jobs run elsewhere and are seen when they have ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from segue.engine.admission import AdmissionControl
from segue.engine.costs import EngineCosts
from segue.engine.device_time import BatchSpan, DeviceMeter
from segue.engine.flights import Flight, Flights
from segue.engine.forward_pass import ForwardPass, PassState, RequestRows
from segue.engine.kv import KvPages
from segue.engine.lora.bridge import CpuBridge
from segue.engine.lora.events import LoadFailed
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.store import AdapterStore
from segue.engine.memory.pool import PagePool
from segue.engine.messages import StepOutput, Submit, VersionFailed
from segue.engine.outcomes import Outcomes
from segue.engine.planner import StepPlanner
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.engine.runner import PassRunner
from segue.engine.sampler import Sampler
from segue.engine.step_costs import StepCosts
from segue.engine.versions import AdapterVersions
from segue.errors import AdapterRejectedError, EngineUnavailableError, SegueError
from segue.scheduler.plan import LEAST_PASS_LAYERS, Admission, CpuService, PassPlan, PassRows, SchedulerLimits, StepPlan
from segue.scheduler.policy import PolicyName
from segue.types import FinishReason

# Copies that one step enqueues: a load of a few, and no more than keeps messages and plans waiting for a millisecond.
_MOST_COPIES = 8
# Landings, and slots of jobs that are over, are noticed so late where nothing else is under way.
_NAP_SECONDS = 50e-6


class Engine:
    """One base model, its pool and its adapters. ``step`` is called as long as there is work.

    ``max_waiting`` bounds the queue, of which a tenant may have ``tenant_queue_share``. ``policy`` is a PolicyName.
    With ``check_invariants`` every manager is verified after every step.
    """

    def __init__(
        self,
        *,
        runner: PassRunner,
        pool: PagePool,
        store: AdapterStore,
        bridge: CpuBridge,
        limits: SchedulerLimits,
        max_waiting: int,
        prefix_cache: bool,
        costs: EngineCosts,
        sampler: Sampler,
        step_costs: StepCosts,
        clock: Callable[[], float],
        policy: str = PolicyName.SLO.value,
        tenant_queue_share: float = 1.0,
        max_adapters: int | None = None,
        runs_ahead: bool = False,
        cpu_service: CpuService | None = None,
        meter: DeviceMeter | None = None,
        times_device: bool = False,
        check_invariants: bool = False,
    ) -> None:
        """``runs_ahead``: enqueue a step before the one before is read. ``cpu_service`` serves adapters without pages,
        if given. ``meter`` measures the batches, ``step_costs`` learns from them; ``times_device``: by a CUDA device's
        events, not the host's clock."""
        self._runner = runner
        self._pool = pool
        self._store = store
        self._bridge = bridge
        self._limits = limits
        self._costs = costs
        self._clock = clock
        self._check_invariants = check_invariants
        self._requests = RequestTable(costs.start_by)
        self._kv = KvPages(
            pool, self._requests, prefill_rate=costs.prefill_rate, clock=clock, prefix_cache=prefix_cache
        )
        self._residency = Residency(store, pool, self._requests)
        self._versions = AdapterVersions(
            store, self._residency, self._requests,
            pool_pages=pool.pages, forget_kv=self._kv.drop_version,
        )  # fmt: skip
        self._planner = StepPlanner(
            requests=self._requests, kv=self._kv, residency=self._residency, pool=pool, limits=limits,
            policy=PolicyName(policy), costs=costs, most_adapters=max_adapters, clock=clock,
            cpu=cpu_service,
        )  # fmt: skip
        self._admission = AdmissionControl(
            requests=self._requests, versions=self._versions, residency=self._residency, kv=self._kv, pool=pool,
            limits=limits, costs=costs, max_waiting=max_waiting, tenant_share=tenant_queue_share, clock=clock,
        )  # fmt: skip
        self._outcomes = Outcomes(
            requests=self._requests, kv=self._kv, store=store, versions=self._versions, costs=costs, clock=clock
        )
        self._passes: list[ForwardPass] = []
        self._flights = Flights(sampler, clock)
        self._runs_ahead = runs_ahead
        self._meter = meter
        self._times_device = times_device
        self.step_costs = step_costs
        self._step_start_seconds = 0.0
        self._settled_seconds = 0.0
        self._unreported: list[VersionFailed] = []
        self._progressed = False
        self.steps = 0
        self.refusals: Counter[str] = Counter()

    @property
    def requests(self) -> RequestTable:
        return self._requests

    @property
    def kv(self) -> KvPages:
        return self._kv

    @property
    def versions(self) -> AdapterVersions:
        return self._versions

    @property
    def passes(self) -> Sequence[ForwardPass]:
        """Passes that have not ended."""
        return self._passes

    @property
    def can_go_on(self) -> bool:
        """Whether another step would do anything before something arrives from outside."""
        return self._has_progressed or len(self._flights) > 0 or any(item.can_go_on for item in self._passes)

    @property
    def _has_progressed(self) -> bool:
        return self._progressed or self._outcomes.progressed

    @property
    def must_look_again(self) -> bool:
        """Whether all that can go on are passes and copies that wait for the device: a short sleep costs nothing."""
        if self._has_progressed or len(self._flights) > 0:
            return False
        going = [item for item in self._passes if item.can_go_on]
        return all(item.must_look_again for item in going) and (bool(going) or self._store.awaits_landings)

    def await_device(self, seconds: float) -> None:
        """Wait until the device has brought a pass further, for so long at most; other threads may run meanwhile.

        A first token is there some microseconds later than the device has it, where a sleep takes a hundred.
        """
        going = [item for item in self._passes if item.awaits_device]
        if not going:
            # A worker that ends a job may need the core.
            time.sleep(_NAP_SECONDS)
            return
        until = self._clock() + seconds
        while self._clock() < until and not any(item.device_is_there for item in going):
            time.sleep(0)

    # -- messages ----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Queue a request, or report why it cannot be served."""
        request = self._admission.request(submit)
        if isinstance(request, SegueError):
            self.refusals[request.reason] += 1
            self._outcomes.refuse(submit.number, request)
            return
        self._requests.add(request)
        self._kv.announce(request)
        if submit.adapter_version_id is not None:
            self._store.acquire(submit.adapter_version_id)
            # By the time that it is admitted a small adapter has been read.
            request.timeline.tier = self._residency.tier(submit.adapter_version_id)
            self._store.start_load(submit.adapter_version_id)

    def cancel(self, number: int) -> None:
        """End a request; its pages are free as soon as the pass that it is in has ended."""
        request = self._requests.get(number)
        if request is not None and request.state is not RequestState.ENDING:
            self._outcomes.finish(request, FinishReason.CANCELLED)

    def open_version(self, manifest: AdapterManifest, descriptor: int, *, pinned: bool = False) -> None:
        """Make an adapter version known; the engine owns ``descriptor`` from now on."""
        needs = (self._admission.pages_needed(request.submit) for request in self._requests)
        try:
            self._versions.open(manifest, descriptor, pinned=pinned, largest_need_pages=max(needs, default=0))
        except AdapterRejectedError as error:
            self._fail_version(manifest.version_id, error)

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> tuple[StepOutput, list[VersionFailed]]:
        """Plan one step and carry it out; what it brought, and the versions that failed.

        Where the engine runs ahead, the step is enqueued before the tokens of the step before are read. Only a plan
        that takes pages from a request, and tokens that the next ones depend on, are waited for.
        """
        self.steps += 1
        self._step_start_seconds = self._clock()
        self._progressed = self._outcomes.progressed = False
        self._apply_store_events()
        self._bridge.reap()
        self._residency.keep_in_host()
        if any(flight.needs_reading for flight in self._flights):
            self._settle(len(self._flights))
        plan = self._planner.plan(self._passes, self._runner.idle_sets)
        if plan.preempt and self._flights:
            self._settle(len(self._flights))
            plan = self._planner.plan(self._passes, self._runner.idle_sets)
        before = len(self._flights)
        self._carry_out(plan)
        self._settle(before if self._runs_ahead else len(self._flights))
        if self._check_invariants:
            self.check()
        failures, self._unreported = self._unreported, []
        return self._outcomes.take_output(), failures

    def check(self) -> None:
        """Verify the invariants of every manager. Raises AssertionError."""
        self._requests.check(self._limits.page_tokens)
        self._pool.check()
        self._store.check()
        self._bridge.check()
        self._kv.check(self._requests)
        self._flights.check()
        in_passes = {rows.request.number for item in self._passes for rows in item.rows}
        said = {request.number for request in self._requests if request.in_pass}
        assert in_passes == said, f"in passes {in_passes}, {said} say so"
        enqueued = {rows.request.number for flight in self._flights for rows in flight}
        said = {request.number for request in self._requests if request.flights}
        assert enqueued == said, f"under way {enqueued}, {said} say so"
        own_pages = sum(len(request.own_pages) for request in self._requests)
        held = self._pool.free_pages + own_pages + self._kv.cached_pages + self._store.device_pages_held
        assert held == self._pool.pages, f"{held} pages are accounted for of {self._pool.pages}"

    # -- parts of a step ---------------------------------------------------------------------------------------------

    def _carry_out(self, plan: StepPlan) -> None:
        for version_id in plan.evict:
            self._store.evict_device(version_id)
        for number in plan.preempt:
            self._preempt(self._known(number))
        for admission in plan.admit:
            self._kv.hold(self._known(admission.number), admission.cached_pages)
        self._kv.reclaim(plan.reclaim_pages)
        for number in plan.grow:
            self._kv.allocate(self._known(number), 1)
        for item in plan.adapters:
            self._residency.start_copy(item.version_id, item.pages)
        now, later = _admissions_in_order(plan)
        for admission in now:
            self._admit(admission)
        if plan.passes:
            # The link is busy while the first pass is prepared.
            self._store.enqueue_copies()
        for pass_plan in plan.passes:
            self._start_pass(pass_plan)
        if plan.batch:
            self._run_batch(plan.batch)
        self._advance_passes(plan)
        for admission in later:
            self._admit(admission)
            self._store.enqueue_copies()

    def _known(self, number: int) -> Request:
        request = self._requests.get(number)
        if request is None:
            raise KeyError(f"the plan names request {number}, which has ended")
        return request

    def _apply_store_events(self) -> None:
        for event in self._store.drain():
            self._progressed = True
            if isinstance(event, LoadFailed):
                kind = EngineUnavailableError if event.may_pass else AdapterRejectedError
                self._fail_version(event.version_id, kind(event.message))

    def _fail_version(self, version_id: int, error: SegueError) -> None:
        self._versions.fail(version_id, error)
        may_pass = isinstance(error, EngineUnavailableError)
        self._unreported.append(VersionFailed(version_id, error.message, may_pass))
        for request in self._requests:
            if request.version_id == version_id and request.state is not RequestState.ENDING:
                self._outcomes.fail(request, error)
        for item in self._passes:
            if any(rows.request.version_id == version_id for rows in item.rows):
                # It would wait for weights that never come. Rows of other adapters in it are computed again.
                item.close()

    def _preempt(self, request: Request) -> None:
        self._kv.release(request)
        self._requests.preempt(request)
        self._kv.announce(request)

    def _admit(self, admission: Admission) -> None:
        request = self._known(admission.number)
        if admission.version_id is not None and admission.adapter_pages:
            self._residency.start_copy(admission.version_id, admission.adapter_pages)
        self._requests.admit(request)
        self._kv.allocate(request, admission.kv_pages)
        request.timeline.admit(self._clock())
        if request.timeline.prefill_attempts == 1:
            request.cached_prompt_tokens = request.computed_tokens

    def _start_pass(self, plan: PassPlan) -> None:
        rows = self._rows(plan.rows)
        cpu_allowed = all(item.request.cpu_allowed for item in rows)
        self._passes.append(self._runner.start(rows, cpu_allowed=cpu_allowed, sample=self._flights.sample))
        for item in rows:
            item.request.in_pass = True
        versions = (item.request.version_id for item in rows)
        self._store.begin_pass({version_id for version_id in versions if version_id is not None})

    def _run_batch(self, planned: Sequence[PassRows]) -> None:
        rows = self._rows(planned)
        # Passes beside it share the device: its time would be theirs as well.
        loads = None if self._passes else self.step_costs.loads(rows)
        span = BatchSpan() if self._times_device else None
        with nullcontext() if self._meter is None else self._meter.batch():
            self._flights.launch(self._runner.run(rows), self._step_start_seconds, loads, span)
        if span is not None:
            span.close()
        self._progressed = True

    def _rows(self, planned: Sequence[PassRows]) -> list[RequestRows]:
        return [RequestRows(self._known(item.number), item.start, item.count) for item in planned]

    def _advance_passes(self, plan: StepPlan) -> None:
        """Enqueue copies as well, between the passes' layers: a pass goes on with what has just been enqueued."""
        if not plan.bounds_passes:
            self._advance_each(plan)
        for _ in range(_MOST_COPIES):
            if not self._store.enqueue_copies():
                break
            self._progressed = True
            if not plan.bounds_passes and any(item.awaits_copies for item in self._passes):
                self._advance_each(plan)
        if plan.bounds_passes:
            self._advance_each(plan)

    def _advance_each(self, plan: StepPlan) -> None:
        for item in list(self._passes):
            if all(rows.request.state is RequestState.ENDING for rows in item.rows):
                item.close()
            with torch.inference_mode():
                item.advance(self._most_layers(item, plan))
            if item.state is PassState.LOST:
                for rows in item.rows:
                    rows.request.lost_passes += 1
                    rows.request.timeline.retry()
            elif not self._has_ended(item):
                continue
            self._leave(item)
            self._progressed = True

    def _most_layers(self, item: ForwardPass, plan: StepPlan) -> int | None:
        if plan.bounds_passes and item.applier.without_pages:
            # The workers compute all of it, in many steps: those that decode must hardly feel it.
            return self._limits.layers_per_step or LEAST_PASS_LAYERS
        return plan.most_layers(rows=sum(rows.count for rows in item.rows), layers=self._pool.layers)

    def _is_verified(self, item: ForwardPass) -> bool:
        versions = {rows.request.version_id for rows in item.rows}
        return all(version_id is None or self._store.is_verified(version_id) for version_id in versions)

    def _has_ended(self, item: ForwardPass) -> bool:
        return item.state is PassState.CLOSED or (item.state is PassState.DONE and self._is_verified(item))

    def _leave(self, item: ForwardPass) -> None:
        """The pass has ended: its requests may be scheduled again, and those that were ending end."""
        self._passes.remove(item)
        for rows in item.rows:
            rows.request.in_pass = False
        if item.state is PassState.DONE:
            self._outcomes.take(item.result, item.choice.read())
        else:
            for rows in item.rows:
                self._outcomes.settle(rows.request)

    def _settle(self, count: int) -> None:
        """Read the first ``count`` flights: take their KV as computed, and the tokens that they bring."""
        for flight in list(self._flights)[:count]:
            chosen = self._flights.land(flight)
            self._observe(flight)
            self._outcomes.take(flight.result, chosen)

    def _observe(self, flight: Flight) -> None:
        now = self._clock()
        if flight.span is None:
            seconds = now - max(flight.start_seconds, self._settled_seconds)
        else:
            seconds = flight.span.seconds()
        self._costs.observe(flight.row_count, len(flight.result.rows), seconds)
        if flight.loads is not None and not self._passes:
            self.step_costs.observe(*flight.loads, seconds)
            self._costs.measured = self.step_costs.profile
        self._settled_seconds = now


def _admissions_in_order(plan: StepPlan) -> tuple[list[Admission], list[Admission]]:
    """Those whose rows run in this step, or that bring the pages of an adapter whose rows do, and the others: the
    device need not wait while these get their pages."""
    running = {rows.number for rows in plan.batch}
    running.update(rows.number for item in plan.passes for rows in item.rows)
    adapters = {version_id for item in plan.passes for version_id in item.version_ids}
    now: list[Admission] = []
    later: list[Admission] = []
    for admission in plan.admit:
        brings_pages = admission.adapter_pages > 0 and admission.version_id in adapters
        (now if admission.number in running or brings_pages else later).append(admission)
    return now, later
