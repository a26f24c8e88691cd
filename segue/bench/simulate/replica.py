"""One simulated replica: the engine's own scheduler, carried out by a clock and a cost model."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from segue.bench.simulate.config import ReplicaConfig, Targets
from segue.bench.simulate.residency import NoPrefixes, SimulatedResidency
from segue.bench.simulate.tally import Tally, context_tokens
from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.batch import plan_step
from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.placement import PlacementRequest
from segue.scheduler.plan import (
    Admission,
    AdmittedRequest,
    PassPlan,
    PassRows,
    QueuedRequest,
    ServiceLevel,
    StepPlan,
    pages_for,
)
from segue.scheduler.policy import PolicyName, prompt_seconds, step_order
from segue.scheduler.waiting import WaitingLine

# What prompts took is forgotten over so many seconds of steps: some answers long.
SHARE_SECONDS = 10.0


class SimulationError(Exception):
    """A simulation that cannot go on. The message is one line."""


@dataclass(slots=True)
class Served:
    """A request on a replica. Times are in seconds of the simulation.

    Of its ``tokens``, ``computed`` have KV. ``prompt_rows`` are to be computed before its next token.
    """

    request: SimulatedRequest
    arrived: float
    tokens: int
    prompt_rows: int
    level: ServiceLevel
    preemptions: int = 0
    computed: int = 0
    pages: int = 0
    generated: int = 0
    in_flight: bool = False
    first_token: float | None = None
    finished: float | None = None

    @property
    def number(self) -> int:
        return self.request.number

    @property
    def version_id(self) -> int | None:
        return None if self.request.adapter is None else self.request.adapter.version_id

    def queued_view(self) -> QueuedRequest:
        """What the scheduler sees of it while it waits."""
        return QueuedRequest(
            number=self.number,
            tokens=self.tokens,
            version_id=self.version_id,
            level=self.level,
            has_token=self.generated > 0,
            preemptions=self.preemptions,
        )

    @property
    def rank(self) -> int:
        return 0 if self.request.adapter is None else self.request.adapter.rank


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass under way, which ends at ``ends``."""

    plan: PassPlan
    ends: float


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
        self._queue: list[Served] = []
        self._waiting = WaitingLine()
        self._admitted: dict[int, Served] = {}
        self._residency = SimulatedResidency(config)
        self._prefixes = NoPrefixes()
        self._free_pages = config.pages
        self._queued_pages = 0
        self._flights = 0
        self._decodes = Tally()
        self._prompts = Tally()
        self._step_rows: tuple[PassRows, ...] | None = None
        self._prompt_share = 0.0
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
        return self._prompt_share

    @property
    def time_per_token_seconds(self) -> float:
        return self._targets.step_seconds

    def uses_adapter(self, version_id: int) -> bool:
        return self._decodes.uses(version_id)

    def is_resident(self, version_id: int) -> bool:
        return self._residency.is_resident(version_id)

    def has_room(self, request: PlacementRequest) -> bool:
        pages = pages_for(request.prompt_tokens, self._config.limits.page_tokens) + 1 + self._queued_pages
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
        self._enqueue(served)
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
        if not plan.batch and not plan.passes:
            if not self._flights and not landings and not self._residency.landing:
                raise SimulationError("no request can run, and nothing is under way that could change it")
            return Begun(None, (), landings)
        rows = self._rows_to_run(plan)
        seconds, flights = self._time_of(rows, plan.passes, now)
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
        assert self._queued_pages == sum(self._pages(item.tokens) + 1 for item in self._queue)
        self._waiting.check([item.number for item in self._queue])

    def _plan(self, now: float) -> StepPlan:
        queue, policy = step_order(PolicyName(self._config.policy), self._waiting, now=now, profile=self.profile)
        return plan_step(
            queue,
            [self._view(item) for item in self._admitted.values()],
            free_pages=self._free_pages,
            passes_in_flight=self._flights,
            residency=self._residency,
            prefixes=self._prefixes,
            limits=self._config.limits,
            policy=policy,
        )

    def _pages(self, tokens: int) -> int:
        return pages_for(tokens, self._config.limits.page_tokens)

    def _enqueue(self, served: Served) -> None:
        """Into the order of arrival: one that was preempted comes before those that arrived later."""
        bisect.insort(self._queue, served, key=lambda item: item.request.number)
        by_seconds = served.level.first_token_by_seconds
        self._waiting.add(
            served.queued_view(), by_seconds - prompt_seconds(self.profile, served.tokens, 0, served.level)
        )
        self._queued_pages += self._pages(served.tokens) + 1

    @staticmethod
    def _view(item: Served) -> AdmittedRequest:
        return AdmittedRequest(
            number=item.request.number,
            tokens=item.tokens,
            computed_tokens=item.computed,
            pages=item.pages,
            own_pages=item.pages,
            sole_pages=0,
            version_id=item.version_id,
            in_flight=item.in_flight,
            level=item.level,
            generated_tokens=item.generated,
            first_token_seconds=item.first_token,
            preemptions=item.preemptions,
        )

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
        place = bisect.bisect_left(self._queue, admission.number, key=lambda item: item.request.number)
        served = self._queue.pop(place)
        self._waiting.admit(served.number)
        self._queued_pages -= self._pages(served.tokens) + 1
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
        self._enqueue(served)

    def _give_back(self, served: Served) -> None:
        self._free_pages += served.pages
        self._waiting.shares.stop_running(served.level.tenant)
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

    def _time_of(
        self, batch: Sequence[PassRows], passes: Sequence[PassPlan], now: float
    ) -> tuple[float, tuple[Flight, ...]]:
        """Seconds of a step, and the passes that begin in it.

        The device computes the rows of passes as well: each pass on its own, or all prompts in one iteration where
        they do not ride. A pass ends with the step or, where its weights come later, when they have come.
        """
        decodes, prompts = self._loads(batch)
        seconds, loads = 0.0, []
        for item in passes:
            one, more = self._loads(item.rows)
            loads.append(one.joined(more, shared_adapter=bool(one.tokens)))
            if self.profile.prompts_ride:
                seconds += self.profile.prefill_seconds(loads[-1])
            else:
                prompts = prompts.joined(loads[-1])
        seconds += self.profile.step_seconds(decodes, prompts)
        weight = math.exp(-seconds / SHARE_SECONDS)
        share = 1 - self.profile.decode_seconds(decodes) / seconds
        self._prompt_share += (1 - weight) * (share - self._prompt_share)
        cores = self._config.cpu_cores
        return seconds, tuple(
            Flight(item, now + max(seconds, self.profile.cold_prefill_seconds(load, cores)))
            for item, load in zip(passes, loads, strict=True)
        )

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
            self._waiting.shares.charge(served.level.tenant, answer_tokens=1)
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
