"""How long the scheduler takes to decide a step: ordering the queue, planning, and the policy's answers. No device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from segue.bench.report import Percentiles, Report, Row
from segue.bench.simulate.config import ReplicaConfig
from segue.bench.simulate.presets import DEFAULT
from segue.bench.simulate.residency import NoPrefixes, SimulatedResidency
from segue.config import require_positive
from segue.scheduler.batch import plan_step
from segue.scheduler.placement import AdapterCost
from segue.scheduler.plan import AdmittedRequest, QueuedRequest, SchedulerLimits, ServiceLevel, StepPlan
from segue.scheduler.policy import PolicyName, step_order
from segue.scheduler.waiting import WaitingLine

_PAGE_TOKENS, _PROMPT_TOKENS, _ANSWER_TOKENS = 16, 128, 64
_TARGETS = ((0.1, 0.02), (0.2, 0.03), (2.0, 0.1))
_ADAPTERS = 64
# Steps before the first that counts.
_WARM_UP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerBenchConfig:
    """``running`` requests, one in eight of which still computes its prompt, and ``waiting`` ones of each of these
    numbers of ``tenants``. ``steps`` are timed for each case."""

    running: int = 128
    waiting: int = 2000
    tenants: tuple[int, ...] = (1, 16, 256)
    steps: int = 300

    def __post_init__(self) -> None:
        require_positive(self, "running", "waiting", "steps")


def run_scheduler_bench(config: SchedulerBenchConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Time a step's plan under both policies, with no place left, with one, and with places for 16 more."""
    rows: list[Row] = []
    for policy in PolicyName:
        for tenants in config.tenants:
            for places in (0, 1, 16):
                case = f"{policy.value}, {tenants} tenants, {places} places"
                progress(case)
                times = [1e3 * value for value in time_steps(config, policy, tenants, places)]
                middle = Percentiles.of(times)
                rows.append(
                    Row(
                        measure="plan_ms",
                        batch=config.running,
                        adapters=_ADAPTERS,
                        case=case,
                        mean=sum(times) / len(times),
                        median=middle.median,
                        p10=middle.p10,
                        p90=middle.p90,
                        runs=middle.runs,
                    )
                )
    return Report.here("scheduler", {"running": config.running, "waiting": config.waiting}, rows)


def time_steps(config: SchedulerBenchConfig, policy: PolicyName, tenants: int, places: int) -> Sequence[float]:
    """Seconds of each step. What a plan decides is not carried out: every step finds the same state."""
    limits = SchedulerLimits(
        page_tokens=_PAGE_TOKENS,
        max_running=config.running + places,
        max_passes=16,
        budget_tokens=512,
        chunk_tokens=128,
        layers_per_step=2,
    )
    replica = ReplicaConfig(profile=DEFAULT.replica.profile, limits=limits, pages=1 << 20, page_bytes=2 << 20)
    residency = SimulatedResidency(replica)
    line, admitted = _state(config, tenants, residency)
    seconds = []
    for _ in range(_WARM_UP + config.steps):
        start = time.perf_counter()
        plan = _plan(line, admitted, policy, replica, residency)
        seconds.append(time.perf_counter() - start)
        if len(plan.admit) > places:
            raise AssertionError(f"{len(plan.admit)} are admitted to {places} places")
    return seconds[_WARM_UP:]


def _plan(
    line: WaitingLine,
    admitted: Sequence[AdmittedRequest],
    policy: PolicyName,
    replica: ReplicaConfig,
    residency: SimulatedResidency,
) -> StepPlan:
    queue, step_policy = step_order(policy, line, now=1.0, profile=replica.profile)
    return plan_step(
        queue,
        admitted,
        free_pages=replica.pages // 2,
        passes_in_flight=0,
        residency=residency,
        prefixes=NoPrefixes(),
        limits=replica.limits,
        policy=step_policy,
    )


def _state(
    config: SchedulerBenchConfig, tenants: int, residency: SimulatedResidency
) -> tuple[WaitingLine, Sequence[AdmittedRequest]]:
    """Requests with targets of three kinds and adapters that are on the device."""
    adapters = [AdapterCost(version_id, 8 << version_id % 4, 1_700_000 << version_id % 4) for version_id in range(64)]
    for adapter in adapters:
        residency.announce(adapter)
        residency.load(adapter.version_id)
        residency.land(adapter.version_id)
    line = WaitingLine()
    admitted = []
    for number in range(config.running + config.waiting):
        ttft_seconds, token_seconds = _TARGETS[number % len(_TARGETS)]
        level = ServiceLevel(
            tenant=str(number % tenants),
            first_token_by_seconds=1.0 + ttft_seconds,
            token_seconds=token_seconds,
            queued_seconds=number / (config.running + config.waiting),
            adapter=adapters[number % _ADAPTERS],
        )
        start_by = level.first_token_by_seconds - 0.02
        version_id = number % _ADAPTERS
        line.add(QueuedRequest(number=number, tokens=_PROMPT_TOKENS, version_id=version_id, level=level), start_by)
        if number >= config.running:
            continue
        line.admit(number)
        residency.acquire(version_id)
        generated = 0 if number % 8 == 0 else 1 + number % _ANSWER_TOKENS
        tokens = _PROMPT_TOKENS + generated
        admitted.append(
            AdmittedRequest(
                number=number,
                tokens=tokens,
                computed_tokens=tokens - 1 if generated else 0,
                pages=-(-tokens // _PAGE_TOKENS) + 1,
                own_pages=-(-tokens // _PAGE_TOKENS) + 1,
                sole_pages=0,
                version_id=version_id,
                in_flight=False,
                level=level,
                generated_tokens=generated,
                first_token_seconds=0.5 if generated else None,
            )
        )
    return line, admitted
