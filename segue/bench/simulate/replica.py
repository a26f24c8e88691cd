"""One simulated replica: the engine's own scheduler, carried out by a clock and a cost model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from segue.bench.simulate.config import ReplicaConfig, Targets
from segue.bench.simulate.device import Flight, SimulatedDevice
from segue.bench.simulate.queue import SimulatedQueue
from segue.bench.simulate.residency import NoPrefixes, SimulatedResidency
from segue.bench.simulate.served import Served, SimulationError
from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.batch import plan_step
from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.placement import PlacementRequest
from segue.scheduler.plan import Admission, PassRows, ServiceLevel, StepPlan, pages_for
from segue.scheduler.tally import Tally, context_tokens


@dataclass(frozen=True, slots=True)
class Begun:
    """What a plan has begun: a step that ends at ``ends`` (None: nothing to compute now), passes, and the copies of
    adapters, with the times at which they land."""

    ends: float | None
    flights: tuple[Flight, ...] = ()
    landings: tuple[tuple[int, float], ...] = ()


class Replica:
    """A replica that is told when its steps end. It is the ReplicaState of placement as well."""

    def __init__(self, config: ReplicaConfig, targets: Targets) -> None:
        self._config = config
        self._targets = targets
        self._queue = SimulatedQueue(config)
        self._admitted: dict[int, Served] = {}
        self._residency = SimulatedResidency(config)
        self._device = SimulatedDevice(config, self._residency)
        self._prefixes = NoPrefixes()
        self._free_pages = config.pages
        self._flights = 0
        self._decodes = Tally()
        self._prompts = Tally()
        self._step_rows: tuple[PassRows, ...] | None = None
        self.preemptions = 0

    @property
    def profile(self) -> CostProfile:
        return self._config.profile

    @property
    def requests(self) -> int:
        return len(self._queue) + len(self._admitted)

    @property
    def decodes(self) -> StepLoad:
        return self._decodes.load

    @property
    def prompts(self) -> StepLoad:
        return self._prompts.load

    @property
    def prompt_share(self) -> float:
        return self._device.prompt_share

    @property
    def time_per_token_seconds(self) -> float:
        return self._targets.step_seconds

    def uses_adapter(self, version_id: int) -> bool:
        return self._decodes.uses(version_id)

    def is_resident(self, version_id: int) -> bool:
        return self._residency.is_resident(version_id)

    def has_room(self, request: PlacementRequest) -> bool:
        pages = pages_for(request.prompt_tokens, self._config.limits.page_tokens) + 1 + self._queue.pages
        adapter = request.adapter
        if adapter is not None and not self._residency.is_resident(adapter.version_id):
            pages += self._residency.pages_of(adapter)
        fits = pages <= self._free_pages + self._residency.idle_pages
        return fits and self.requests < self._config.limits.max_running

    def submit(self, request: SimulatedRequest, now: float) -> Served:
        """Queue a request. Raises SimulationError for one that an empty replica could not hold to its end."""
        targets = request.targets or self._targets
        level = ServiceLevel(
            tenant=request.tenant,
            first_token_by_seconds=now + targets.ttft_seconds,
            token_seconds=targets.step_seconds,
            queued_seconds=now,
            adapter=request.adapter,
        )
        served = Served(request, now, tokens=request.prompt_tokens, prompt_rows=request.prompt_tokens, level=level)
        needed = self._pages(request.prompt_tokens + request.output_tokens) + 1
        if request.adapter is not None:
            needed += self._residency.pages_of(request.adapter)
            self._residency.announce(request.adapter)
        if needed > self._config.pages:
            raise SimulationError(f"a request needs {needed} pages, a replica has {self._config.pages}")
        self._queue.add(served)
        self._decodes.add(request.adapter, 1, served.tokens)
        self._prompts.add(request.adapter, served.tokens, context_tokens(0, served.tokens))
        return served

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return self._step_rows is not None

    def start_step(self, now: float) -> Begun:
        """Plan the next step and begin it. Raises SimulationError when nothing could ever run."""
        self._residency.now = now
        if not self.requests:
            return Begun(None)
        plan = self._plan(now)
        landings = self._make_room(plan)
        while plan.preempt and not (plan.batch or plan.passes):
            plan = self._plan(now)
            landings += self._make_room(plan)
        if not plan.batch and not plan.passes and not self._device.has_passes:
            if not self._flights and not landings and not self._residency.landing:
                raise SimulationError("no request can run, and nothing is under way that could change it")
            return Begun(None, (), landings)
        rows = self._rows_to_run(plan)
        seconds, flights = self._time_of(rows, plan, now)
        self._step_rows = rows
        return Begun(now + seconds, flights, landings)

    def end_step(self, now: float) -> Sequence[Served]:
        """Apply what the step computed. Returns the requests that are done."""
        assert self._step_rows is not None
        rows, self._step_rows = self._step_rows, None
        return self._apply(rows, now)

    def end_flight(self, flight: Flight, now: float) -> Sequence[Served]:
        """Apply what a pass computed. Returns the requests that are done."""
        self._flights -= 1
        for rows in flight.plan.rows:
            self._admitted[rows.number].in_flight = False
        return self._apply(flight.plan.rows, now)

    def land(self, version_id: int) -> None:
        """An adapter's copy has ended."""
        self._residency.land(version_id)

    def check(self) -> None:
        """Raises AssertionError where pages or sums disagree."""
        assert self._free_pages >= 0
        self._residency.check(self._free_pages + sum(item.pages for item in self._admitted.values()))
        everybody = [*self._queue, *self._admitted.values()]
        assert self.decodes.tokens == len(everybody)
        assert self.decodes.context_tokens == sum(item.tokens for item in everybody)
        assert self.prompts.tokens == sum(item.prompt_rows for item in everybody)
        assert self.decodes.max_rank == max((item.rank for item in everybody), default=0)
        self._queue.check()

    def _plan(self, now: float) -> StepPlan:
        queue, policy = self._queue.order(now)
        return plan_step(
            queue,
            [item.admitted_view() for item in self._admitted.values()],
            free_pages=self._free_pages,
            passes_in_flight=self._flights,
            residency=self._residency,
            prefixes=self._prefixes,
            limits=self._config.limits,
            policy=policy,
        )

    def _pages(self, tokens: int) -> int:
        return pages_for(tokens, self._config.limits.page_tokens)

    def _make_room(self, plan: StepPlan) -> tuple[tuple[int, float], ...]:
        """Carry out all of a plan but its rows. Returns the landings that were booked."""
        for version_id in plan.evict:
            self._free_pages += self._residency.evict(version_id)
        for number in plan.preempt:
            self._preempt(self._admitted.pop(number))
        for number in plan.grow:
            self._admitted[number].pages += 1
            self._free_pages -= 1
        landings = [landing for admission in plan.admit for landing in self._admit(admission)]
        for flight in plan.passes:
            for rows in flight.rows:
                self._admitted[rows.number].in_flight = True
        self._flights += len(plan.passes)
        return tuple(landings)

    def _admit(self, admission: Admission) -> Iterable[tuple[int, float]]:
        served = self._queue.admit(admission.number)
        served.pages = admission.kv_pages
        self._free_pages -= admission.kv_pages + admission.adapter_pages
        self._admitted[served.number] = served
        if admission.version_id is None:
            return
        if admission.adapter_pages:
            yield admission.version_id, self._residency.load(admission.version_id)
        self._residency.acquire(admission.version_id)

    def _preempt(self, served: Served) -> None:
        self.preemptions += 1
        served.preemptions += 1
        self._give_back(served)
        computed, rank = served.computed, served.rank
        if served.prompt_rows:
            self._prompts.grow(computed, context_tokens(0, computed), rank)
        else:
            self._prompts.add(served.request.adapter, served.tokens, context_tokens(0, served.tokens))
        served.computed, served.prompt_rows = 0, served.tokens
        self._queue.add(served)

    def _give_back(self, served: Served) -> None:
        self._free_pages += served.pages
        self._queue.stop_running(served)
        served.pages = 0
        if served.version_id is not None:
            self._residency.release(served.version_id)

    def _decodes_in(self, rows: PassRows) -> bool:
        return rows.count == 1 and rows.start == self._admitted[rows.number].tokens - 1

    def _rows_to_run(self, plan: StepPlan) -> tuple[PassRows, ...]:
        """The rows of a step. Where prompts do not ride they run alone, and the next step decodes."""
        if self.profile.prompts_ride:
            return plan.batch
        prompts = tuple(rows for rows in plan.batch if not self._decodes_in(rows))
        return prompts if prompts or plan.passes else plan.batch

    def _loads(self, batch: Sequence[PassRows]) -> tuple[StepLoad, StepLoad]:
        """The load of a batch's rows that decode, and of its rows of prompts."""
        decodes, prompts = Tally(), Tally()
        for rows in batch:
            tally = decodes if self._decodes_in(rows) else prompts
            context = context_tokens(rows.start, rows.count)
            tally.add(self._admitted[rows.number].request.adapter, rows.count, context)
        return decodes.load, prompts.load

    def _time_of(self, batch: Sequence[PassRows], plan: StepPlan, now: float) -> tuple[float, tuple[Flight, ...]]:
        """Seconds of a step with the passes that begin now, and the passes that it brings to their end."""
        decodes, prompts = self._loads(batch)
        for item in plan.passes:
            one, more = self._loads(item.rows)
            load = one.joined(more, shared_adapter=bool(one.tokens))
            self._device.begin(item, load, now)
            if not self.profile.prompts_ride:
                prompts = prompts.joined(load)
        return self._device.step(decodes, prompts, plan, now)

    def _apply(self, batch: Sequence[PassRows], now: float) -> Sequence[Served]:
        done = []
        for rows in batch:
            served = self._admitted[rows.number]
            served.computed += rows.count
            if served.prompt_rows:
                self._count_prompt(served, rows)
            if served.computed < served.tokens:
                continue
            served.tokens += 1
            served.generated += 1
            self._queue.charge(served, answer_tokens=1)
            if served.first_token is None:
                served.first_token = now
            if served.generated < served.request.output_tokens:
                self._decodes.grow(0, 1)
                continue
            served.finished = now
            del self._admitted[served.number]
            self._give_back(served)
            self._decodes.remove(served.request.adapter, 1, served.tokens - 1)
            done.append(served)
        return done

    def _count_prompt(self, served: Served, rows: PassRows) -> None:
        context = context_tokens(rows.start, rows.count)
        served.prompt_rows -= rows.count
        if served.prompt_rows:
            self._prompts.grow(-rows.count, -context, served.rank)
        else:
            self._prompts.remove(served.request.adapter, rows.count, context)
