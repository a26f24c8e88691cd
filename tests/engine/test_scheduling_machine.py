"""The scheduler's plans carried out on real pages, prefixes and requests, with a model that computes nothing.

FakeModel writes a mark into the pool for every token: a hash of the adapter and of all tokens up to it. Whoever
computes a token finds the marks of all tokens before it, whatever was shared, given up, preempted or cancelled between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from segue.engine.kv import KvPages
from segue.engine.memory.pool import PagePool
from segue.engine.messages import Submit
from segue.engine.planner import admitted_view
from segue.engine.rate import RateMeter
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.sampling_params import SamplingParams
from segue.scheduler.batch import plan_step
from segue.scheduler.cost_model import CostProfile, StepCoefficients
from segue.scheduler.plan import NO_LEVEL, PassRows, ServiceLevel, StepPlan, pages_for
from segue.scheduler.policy import PolicyName, step_order
from tests.scheduler.fakes import LIMITS, FakeCpuService, FakeResidency

PAGES = 24
NEEDS = {0: 3, 1: 7, 2: 12}
LANDING_STEPS = 3
PASS_STEPS = 2
PROFILE = CostProfile(
    name="round numbers",
    layers=1,
    decode=StepCoefficients(fixed_seconds=0.5, seconds_per_token=0.05),
    prefill=StepCoefficients(fixed_seconds=0.5, seconds_per_token=0.1),
)
FIRST_TOKENS = tuple(range(10, 22))


@dataclass
class FakeModel:
    """Marks each token's slot in the pool, and refuses to go on where a mark before it is wrong."""

    pool: PagePool

    def compute(self, request: Request, rows: PassRows) -> None:
        slots = self.pool.kv(0)
        mark = hash(("adapter", request.version_id))
        for position in range(rows.start + rows.count):
            mark = hash((mark, request.token_ids[position]))
            page, offset = divmod(position, self.pool.page_tokens)
            slot = slots[request.pages[page], 0, offset, 0]
            if position < rows.start:
                assert int(slot[0]) == mark % (1 << 24), f"request {request.number}, token {position}: foreign KV"
            else:
                slot[0] = mark % (1 << 24)


@dataclass
class World:
    """What an engine does with plans, one pass of each loading adapter ending ``PASS_STEPS`` steps after its start.

    A step takes a second.
    """

    policy: PolicyName
    residency: FakeResidency = field(default_factory=lambda: FakeResidency(needs=NEEDS))
    cpu: FakeCpuService = field(default_factory=FakeCpuService)
    landing: dict[int, int] = field(default_factory=dict)
    adapter_pages: dict[int, tuple[int, ...]] = field(default_factory=dict)
    flying: list[tuple[int, PassRows]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.pool = PagePool(
            layers=1, pages=PAGES, page_tokens=4, kv_heads=1, head_dim=1, dtype=torch.float32, poison_freed=True
        )
        self.requests = RequestTable(lambda item: item.level.first_token_by_seconds - item.tokens / LIMITS.chunk_tokens)
        self.kv = KvPages(
            self.pool,
            self.requests,
            prefill_rate=RateMeter(100.0),
            clock=lambda: float(self.steps),
            prefix_cache=True,
        )
        self.model = FakeModel(self.pool)

    def submit(
        self, number: int, prompt: list[int], max_tokens: int, version_id: int | None, level: ServiceLevel = NO_LEVEL
    ) -> None:
        request = Request.of(
            Submit(
                number=number,
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                arrival_seconds=0.0,
                sampling=SamplingParams(seed=0),
                adapter_version_id=version_id,
            ),
            replace(level, queued_seconds=float(self.steps)),
        )
        self.requests.add(request)
        self.kv.announce(request)

    def step(self) -> StepPlan:
        self.steps += 1
        self._land()
        self.residency.in_use = self.requests.versions_in_use()
        running = [item for item in self.requests.admitted if item.state is RequestState.ADMITTED]
        queue, policy = step_order(
            self.policy, self.requests.waiting, now=float(self.steps), profile=PROFILE, most_adapters=2
        )
        plan = plan_step(
            queue,
            [admitted_view(request, self.kv) for request in running],
            free_pages=self.pool.free_pages,
            passes_in_flight=len(self.flying),
            residency=self.residency,
            prefixes=self.kv,
            limits=LIMITS,
            cpu=self.cpu,
            policy=policy,
        )
        if running:
            assert running[0].number not in plan.preempt, "the oldest was preempted"
        if self.policy is PolicyName.FCFS:
            self._check_order(plan)
        self._give_pages(plan)
        rows = [*plan.batch, *(item for group in plan.passes for item in group.rows)]
        assert len({item.number for item in rows}) == len(rows), "a request computes twice in one step"
        for group in plan.passes:
            for item in group.rows:
                self.known(item.number).in_pass = True
                self.flying.append((self.steps + PASS_STEPS, item))
        for item in plan.batch:
            version_id = self.known(item.number).version_id
            assert version_id is None or version_id in self.residency.warm, "a batch would wait for weights"
        for group in plan.passes:
            members = [self.known(item.number) for item in group.rows]
            on_cpu = {*group.version_ids} <= self.cpu.versions and all(item.cpu_allowed for item in members)
            assert on_cpu or {*group.version_ids} <= self.residency.resident, "a pass has no weights"
        self._commit(plan.batch)
        self._end_passes()
        return plan

    @property
    def queue(self) -> list[Request]:
        return self.requests.queue

    def known(self, number: int) -> Request:
        request = self.requests.get(number)
        assert request is not None
        return request

    def cancel(self, request: Request) -> None:
        if request.in_pass:
            request.move_to(RequestState.ENDING)
        else:
            self._end(request)

    def check(self) -> None:
        self.requests.check(LIMITS.page_tokens)
        self.pool.check()
        self.kv.check(self.requests)
        own = sum(len(request.own_pages) for request in self.requests)
        adapters = sum(len(pages) for pages in self.adapter_pages.values())
        assert self.pool.free_pages + own + self.kv.cached_pages + adapters == PAGES

    def _check_order(self, plan: StepPlan) -> None:
        """Nobody is overtaken but by those who arrived before the one that it waits for has computed."""
        if not plan.admit:
            return
        last = max(item.number for item in plan.admit)
        passed = [item for item in self.queue if item.number < last and item.number not in plan_numbers(plan)]
        assert all(self.kv.match(item.number).pending_pages for item in passed)

    def _give_pages(self, plan: StepPlan) -> None:
        for version_id in plan.evict:
            assert version_id not in self.requests.versions_in_use(), "an adapter in use is evicted"
            self.pool.free(self.adapter_pages.pop(version_id))
            self.residency.resident.discard(version_id)
            self.residency.warm.discard(version_id)
        for number in plan.preempt:
            request = self.known(number)
            self.kv.release(request)
            self.requests.preempt(request)
            self.kv.announce(request)
        for item in plan.admit:
            self.kv.hold(self.known(item.number), item.cached_pages)
        self.kv.reclaim(plan.reclaim_pages)
        for number in plan.grow:
            self.kv.allocate(self.known(number), 1)
        for given in plan.adapters:
            assert given.version_id in self.requests.versions_in_use(), "nobody uses it"
            self._give_adapter(given.version_id, given.pages)
        for item in plan.admit:
            if item.adapter_pages:
                assert item.version_id is not None
                self._give_adapter(item.version_id, item.adapter_pages)
            self.requests.admit(self.known(item.number))
            self.kv.allocate(self.known(item.number), item.kv_pages)

    def _give_adapter(self, version_id: int, pages: int) -> None:
        assert version_id not in self.residency.resident, "it has its pages"
        self.adapter_pages[version_id] = self.pool.allocate(pages, "adapter")
        self.residency.resident.add(version_id)
        self.landing[version_id] = self.steps + LANDING_STEPS

    def _commit(self, rows: tuple[PassRows, ...]) -> None:
        for item in rows:
            request = self.known(item.number)
            assert item.start == request.computed_tokens
            self.model.compute(request, item)
            request.computed_tokens += item.count
            self.kv.commit(request)
            if request.computed_tokens == len(request.token_ids):
                # Answers of one prompt differ, so that their pages do as well.
                if request.timeline.first_token_seconds is None:
                    request.timeline.first_token_seconds = float(self.steps)
                request.append(100 + (request.number + request.generated_tokens) % 3)
                self.requests.waiting.shares.charge(request.level.tenant, answer_tokens=1)
                if request.generated_tokens == request.submit.max_tokens:
                    self._end(request)

    def _end_passes(self) -> None:
        for item in [item for due, item in self.flying if due <= self.steps]:
            request = self.known(item.number)
            request.in_pass = False
            if request.state is RequestState.ENDING:
                self._end(request)
            else:
                self._commit((item,))
        self.flying = [(due, item) for due, item in self.flying if due > self.steps]

    def _end(self, request: Request) -> None:
        self.kv.release(request)
        self.requests.end(request)

    def _land(self) -> None:
        for version_id in [version_id for version_id, due in self.landing.items() if due <= self.steps]:
            del self.landing[version_id]
            self.residency.warm.add(version_id)


def plan_numbers(plan: StepPlan) -> set[int]:
    return {item.number for item in plan.admit}


_seconds = st.sampled_from([math.inf, 0.5, 2.0, 6.0, 30.0])


class Scheduling(RuleBasedStateMachine):
    policy = PolicyName.FCFS

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.policy)
        self.world.cpu.versions = set(NEEDS)
        self.number = 0

    @rule(
        shared=st.integers(0, len(FIRST_TOKENS)),
        own=st.lists(st.integers(1, 3), min_size=1, max_size=9),
        max_tokens=st.integers(1, 14),
        version_id=st.sampled_from([None, 0, 1, 2]),
        copies=st.integers(1, 3),
        first_token_seconds=_seconds,
        token_seconds=_seconds,
        priority=st.integers(-9, 9),
        tenant=st.sampled_from(["", "a", "b"]),
    )
    def submit(
        self,
        shared: int,
        own: list[int],
        max_tokens: int,
        version_id: int | None,
        copies: int,
        first_token_seconds: float,
        token_seconds: float,
        priority: int,
        tenant: str,
    ) -> None:
        level = ServiceLevel(
            tenant=tenant,
            priority=priority,
            first_token_by_seconds=self.world.steps + first_token_seconds,
            token_seconds=token_seconds,
        )
        prompt = [*FIRST_TOKENS[:shared], *own]
        adapter_pages = 0 if version_id is None else NEEDS[version_id]
        if adapter_pages + pages_for(len(prompt) + max_tokens, LIMITS.page_tokens) + 1 <= PAGES:
            for _ in range(copies):
                self.number += 1
                self.world.submit(self.number, prompt, max_tokens, version_id, level)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()
            self.world.check()

    @rule(place=st.integers(0, 30))
    def cancel(self, place: int) -> None:
        live = [request for request in self.world.requests if request.state is not RequestState.ENDING]
        if live:
            self.world.cancel(live[place % len(live)])

    @rule(versions=st.sets(st.sampled_from([0, 1, 2])))
    def have_workers_for(self, versions: set[int]) -> None:
        """From now on CPU workers can serve these adapters without pages, and no others."""
        self.world.cpu.versions = versions

    @rule(place=st.integers(0, 30))
    def lose_passes(self, place: int) -> None:
        """The workers have failed a request too often, which is admitted: others compute nothing."""
        live = self.world.requests.admitted
        if live:
            live[place % len(live)].lost_passes = 3

    @rule(version_id=st.sampled_from([0, 1, 2]))
    def close(self, version_id: int) -> None:
        if all(request.version_id != version_id for request in self.world.requests):
            before = self.world.kv.cached_pages
            self.world.kv.drop_version(version_id)
            assert self.world.kv.cached_pages <= before

    @invariant()
    def is_sound(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """Every request ends, also without workers, and then every page is free, idle or an adapter's."""
        world = self.world
        world.cpu.versions = set()
        work = sum(len(r.submit.prompt_token_ids) + r.submit.max_tokens + 8 for r in world.requests)
        for _ in range(2 * work * (1 + len(world.requests))):
            if not len(world.requests):
                break
            world.step()
            world.check()
        assert not len(world.requests), "the requests do not end"
        assert world.kv.idle_pages == world.kv.cached_pages
        world.kv.reclaim(world.kv.idle_pages)
        assert world.pool.free_pages + sum(map(len, world.adapter_pages.values())) == PAGES


class SloScheduling(Scheduling):
    policy = PolicyName.SLO


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestSloScheduling = SloScheduling.TestCase
TestSloScheduling.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
