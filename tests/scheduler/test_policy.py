"""What SloPolicy answers: who is preempted, whose prompt goes first, how much prefill a step takes, who is kept out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.scheduler.cost_model import CostProfile, StepCoefficients
from segue.scheduler.placement import AdapterCost
from segue.scheduler.plan import NO_LEVEL, AdmittedRequest, PassRows, QueuedRequest, ServiceLevel
from segue.scheduler.policy import (
    AdmissionRoom,
    FirstCome,
    PolicyName,
    PromptRows,
    SloPolicy,
    decode_load,
    prompt_load,
    step_order,
)
from segue.scheduler.waiting import MOST_PREEMPTIONS, PATIENCE_SECONDS, WaitingLine
from tests.scheduler.fakes import LIMITS, FakeResidency, admitted, decoding, plan

PROFILE = CostProfile(
    name="round numbers",
    layers=4,
    decode=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.1),
    prefill=StepCoefficients(fixed_seconds=1.0, seconds_per_token=0.5),
)
WIDE = dataclasses.replace(LIMITS, budget_tokens=64, chunk_tokens=6, page_tokens=2)


def running(number: int, *, level: ServiceLevel = NO_LEVEL, generated: int = 1, first: float = 0.0) -> AdmittedRequest:
    """A request that decodes; its first token came at ``first``."""
    request = decoding(number, tokens=4, pages=1)
    return dataclasses.replace(request, level=level, generated_tokens=generated, first_token_seconds=first)


def prompt(
    number: int, count: int = 10, *, level: ServiceLevel = NO_LEVEL, oldest: bool = False, start: int = 0
) -> PromptRows:
    return PromptRows(PassRows(number, start, count), None, level, oldest)


def order(policy: SloPolicy, *prompts: PromptRows) -> list[int]:
    return [item.rows.number for item in policy.prompt_order(prompts)]


def test_without_targets_both_policies_answer_alike() -> None:
    younger = [running(2), dataclasses.replace(running(3), preemptions=MOST_PREEMPTIONS), running(4)]
    prompts = [prompt(5), prompt(1, 3), prompt(6)]
    answers = [
        (
            [item.number for item in policy.victims(younger)],
            list(policy.prompt_order(prompts)),
            policy.prompt_tokens(younger, prompts, WIDE),
        )
        for policy in (FirstCome(), SloPolicy(now=50.0, profile=PROFILE))
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == [4, 3, 2]


def test_victims_are_of_tenants_with_a_surplus_then_of_low_priority_then_late_then_young() -> None:
    timed = ServiceLevel(token_seconds=2.0)
    policy = SloPolicy(now=10.0, surplus=frozenset({"flood"}))
    younger = [
        running(1, level=ServiceLevel(tenant="flood", priority=5)),
        running(2, level=ServiceLevel(priority=-1)),
        running(3, level=timed, generated=9),
        running(4, level=timed, generated=2),
        running(5),
    ]
    assert [item.number for item in policy.victims(younger)] == [1, 2, 5, 4, 3]


def test_who_was_preempted_twice_is_not_chosen_before_the_youngest() -> None:
    again = dataclasses.replace(running(1, level=ServiceLevel(priority=-3)), preemptions=MOST_PREEMPTIONS)
    younger = [again, running(2, level=ServiceLevel(priority=1)), running(3)]
    assert [item.number for item in SloPolicy(now=0.0).victims(younger)] == [3, 2, 1]


def test_the_oldest_prompt_goes_on_and_then_the_least_slack() -> None:
    def by(seconds: float) -> ServiceLevel:
        return ServiceLevel(first_token_by_seconds=seconds)

    prompts = (
        prompt(1),
        prompt(2, level=by(20.0)),
        prompt(3, 20, level=by(22.0)),
        prompt(4, level=by(11.0)),
        prompt(9, level=by(16.0), oldest=False),
        prompt(7, oldest=True),
    )
    # Ten rows take 6, twenty 11: the slack of 3 is the least but for that of 9, and 4 is late.
    assert order(SloPolicy(now=8.0, profile=PROFILE), *prompts) == [7, 9, 3, 2, 1, 4]


def test_prompts_of_a_tenant_with_a_surplus_come_after_the_others() -> None:
    flood = ServiceLevel(tenant="flood", first_token_by_seconds=9.0)
    policy = SloPolicy(now=0.0, surplus=frozenset({"flood"}), profile=PROFILE)
    assert order(policy, prompt(1, level=flood), prompt(2)) == [2, 1]
    assert order(policy, prompt(1, level=flood, oldest=True), prompt(2)) == [1, 2]


@pytest.mark.parametrize(
    ("generated", "now", "tokens"),
    [
        # A target of 5 is planned as 4.5; a decode step takes 1.1, so 3.4 are left for rows of 0.5.
        (1, 0.0, 6),
        # Two tokens came at once: of the 9 that it is ahead a half may go into this step.
        (3, 0.0, 15),
        # Late by 8 it catches up by half a second in this step.
        (1, 8.0, 5),
        # Late beyond hope: it stands in nobody's way.
        (1, 1000.0, 10),
    ],
)
def test_a_step_takes_as_much_prefill_as_the_running_ones_targets_allow(
    generated: int, now: float, tokens: int
) -> None:
    timed = running(1, level=ServiceLevel(token_seconds=5.0), generated=generated)
    count = 10 if now == 1000.0 else 40
    assert SloPolicy(now=now, profile=PROFILE).prompt_tokens([timed], [prompt(2, count)], WIDE) == tokens


def test_a_prompt_is_never_kept_out_of_a_step() -> None:
    hasty = running(1, level=ServiceLevel(token_seconds=1e-6), generated=1000, first=0.0)
    assert SloPolicy(now=0.0, profile=PROFILE).prompt_tokens([hasty], [prompt(2, 40)], WIDE) == WIDE.page_tokens


def test_without_a_profile_a_step_takes_the_fixed_number_of_rows() -> None:
    timed = running(1, level=ServiceLevel(token_seconds=5.0))
    assert SloPolicy(now=0.0).prompt_tokens([timed], [prompt(2, 40)], WIDE) == WIDE.chunk_tokens


def test_a_target_for_the_first_token_may_take_the_whole_budget() -> None:
    waiting = prompt(2, 100, level=ServiceLevel(first_token_by_seconds=8.0))
    policy = SloPolicy(now=0.0, profile=PROFILE)
    assert policy.prompt_tokens([running(1)], [waiting], WIDE) == WIDE.budget_tokens - 1


def _level(token_seconds: float, adapter: int | None) -> ServiceLevel:
    cost = None if adapter is None else AdapterCost(adapter, 8, 100)
    return ServiceLevel(token_seconds=token_seconds, adapter=cost)


@given(
    decodes=st.lists(st.tuples(st.sampled_from([math.inf, 2.0, 6.0, 20.0]), st.integers(1, 9)), min_size=1, max_size=6),
    prompts=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    now=st.floats(0, 30),
)
def test_no_row_more_than_a_target_allows(decodes: list[tuple[float, int]], prompts: list[int], now: float) -> None:
    """Whoever is not behind its target is not put behind it by the step, but for the least that prompts get."""
    requests = [
        running(number, level=_level(target, number % 2), generated=generated)
        for number, (target, generated) in enumerate(decodes)
    ]
    rows = [prompt(10 + number, count, level=_level(math.inf, 5)) for number, count in enumerate(prompts)]
    tokens = SloPolicy(now=now, profile=PROFILE).prompt_tokens(requests, rows, WIDE)
    most = WIDE.budget_tokens - len(requests)
    assert WIDE.page_tokens <= tokens <= most
    if tokens == WIDE.page_tokens or not any(item.level.token_seconds < math.inf for item in requests):
        return
    taken = min(tokens, sum(prompts))
    seconds = PROFILE.step_seconds(decode_load(requests), prompt_load(taken, 0, NO_LEVEL))
    for item in requests:
        ahead = item.level.token_seconds * (item.generated_tokens - 1) - now
        if 0.9 * item.level.token_seconds * (item.generated_tokens - 1) - now >= 0:
            assert ahead + item.level.token_seconds - seconds >= -1e-9


def test_adapters_are_clustered_for_as_long_as_nobody_waits_for_long() -> None:
    policy = SloPolicy(now=10.0, most_adapters=2, patience_seconds=5.0)
    room = AdmissionRoom(places=8, adapters={1, 2}, prompt_tokens=0)

    def keeps_out(version_id: int | None, queued: float = 8.0) -> bool:
        level = ServiceLevel(queued_seconds=queued)
        return policy.keeps_out(QueuedRequest(number=1, tokens=4, version_id=version_id, level=level), room, LIMITS)

    assert [keeps_out(version_id) for version_id in (None, 1, 2, 3)] == [False, False, False, True]
    assert not keeps_out(3, queued=5.0)


def test_a_step_admits_the_requests_of_few_adapters() -> None:
    queue = [
        QueuedRequest(number=number, tokens=4, version_id=number % 3, level=ServiceLevel(queued_seconds=1.0))
        for number in range(6)
    ]
    residency = FakeResidency(needs=dict.fromkeys(range(3), 1))
    decided = plan(queue, residency=residency, policy=SloPolicy(now=1.0, most_adapters=2))
    assert [item.number for item in decided.admit] == [0, 1, 3, 4]


def test_a_tenant_with_a_surplus_leaves_places_and_rows_to_others() -> None:
    policy = SloPolicy(now=0.0, surplus=frozenset({"flood"}))
    flood = QueuedRequest(number=1, tokens=4, version_id=None, level=ServiceLevel(tenant="flood"))
    small = dataclasses.replace(flood, level=ServiceLevel(tenant="small"))
    for places, prompt_tokens, kept_out in ((2, 0, False), (1, 0, True), (8, LIMITS.budget_tokens, True)):
        room = AdmissionRoom(places=places, adapters=(), prompt_tokens=prompt_tokens)
        assert policy.keeps_out(flood, room, LIMITS) is kept_out
        assert not policy.keeps_out(small, room, LIMITS)
    alike, no_room = (
        dataclasses.replace(policy, surplus=frozenset()),
        AdmissionRoom(places=1, adapters=(), prompt_tokens=0),
    )
    crowd = dataclasses.replace(alike, floods=frozenset({"flood"}))
    assert not alike.keeps_out(flood, no_room, LIMITS)
    assert crowd.keeps_out(flood, no_room, LIMITS)
    assert not dataclasses.replace(crowd, now=PATIENCE_SECONDS).keeps_out(flood, no_room, LIMITS), "it has waited"
    again = dataclasses.replace(flood, preemptions=1)
    assert not policy.keeps_out(again, AdmissionRoom(places=1, adapters=(), prompt_tokens=0), LIMITS)


def test_a_flood_has_an_equal_part_of_the_rows_that_others_leave() -> None:
    """Of 64 rows with four tenants, while another tenant decodes."""
    flood, small = ServiceLevel(tenant="flood"), ServiceLevel(tenant="small")
    policy = SloPolicy(now=0.0, surplus=frozenset({"flood"}), floods=frozenset({"flood"}), tenants=4)
    limits = dataclasses.replace(WIDE, chunk_tokens=64)
    decodes = [running(1, level=small), running(2, level=flood)]

    def rows(*prompts: PromptRows, beside: Sequence[AdmittedRequest] = decodes) -> int:
        return policy.prompt_tokens(beside, prompts, limits)

    assert rows(prompt(3, 100, level=flood)) == 16
    assert rows(prompt(4, 24, level=small), prompt(3, 100, level=flood)) == 24 + 10
    assert rows(prompt(4, 63, level=small), prompt(3, 100, level=flood)) == 64, "a page, as far as there is room"
    assert rows(prompt(4, 60, level=small), prompt(3, 100, level=flood)) == 60 + WIDE.page_tokens
    assert rows(prompt(3, 100, level=flood), beside=decodes[1:]) == 64, "nobody else's tokens are late"
    policy = dataclasses.replace(policy, surplus=frozenset())
    assert rows(prompt(3, 100, level=flood)) == 64, "it was served no more than others"
    assert order(policy, prompt(3, level=flood), prompt(4, level=small)) == [4, 3]


def test_a_plan_takes_pages_from_the_policys_victim() -> None:
    flood = dataclasses.replace(running(2), level=ServiceLevel(tenant="flood"))
    needy = dataclasses.replace(running(1), tokens=5, computed_tokens=4)
    decided = plan(
        (), [needy, flood, running(3)], free_pages=0, policy=SloPolicy(now=0.0, surplus=frozenset({"flood"}))
    )
    assert (decided.preempt, decided.grow) == ((2,), (1,))


def test_the_names_of_policies_choose_the_order() -> None:
    line = WaitingLine()
    line.add(QueuedRequest(number=1, tokens=4, version_id=None))
    line.add(QueuedRequest(number=2, tokens=4, version_id=None), 5.0)
    found = {name: [item.number for item in step_order(name, line, now=1.0)[0]] for name in PolicyName}
    assert found == {PolicyName.FCFS: [1, 2], PolicyName.SLO: [2, 1]}


def test_requests_that_are_admitted_are_not_behind_their_own_prompt() -> None:
    """The oldest admitted request gets its rows whatever the others' targets are."""
    urgent = dataclasses.replace(admitted(2, 16, pages=5), level=ServiceLevel(first_token_by_seconds=9.0))
    decided = plan((), [admitted(1, 12, pages=4), urgent], policy=SloPolicy(now=0.0, profile=PROFILE))
    assert decided.batch == (PassRows(1, 0, 12), PassRows(2, 0, 4))
