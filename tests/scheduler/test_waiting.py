"""The order of admission: slack, patience, priorities, tenants; and that nobody waits for ever."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from segue.scheduler.fair_share import DEFAULT_CREDIT_TOKENS
from segue.scheduler.plan import QueuedRequest, ServiceLevel
from segue.scheduler.waiting import MOST_PREEMPTIONS, OVERDUE_TURN, PATIENCE_SECONDS, PRIORITY_SECONDS, WaitingLine


def waiting(
    number: int,
    *,
    tenant: str = "",
    priority: int = 0,
    queued: float = 0.0,
    tokens: int = 10,
    preemptions: int = 0,
    has_token: bool = False,
) -> QueuedRequest:
    level = ServiceLevel(tenant=tenant, priority=priority, queued_seconds=queued)
    return QueuedRequest(
        number=number, tokens=tokens, version_id=None, level=level, preemptions=preemptions, has_token=has_token
    )


def numbers(line: WaitingLine, now: float = 0.0) -> list[int]:
    line.advance(now)
    return [request.number for request in line.order(now)]


def test_without_targets_the_order_is_that_of_arrival() -> None:
    line = WaitingLine()
    for number in (1, 2, 3):
        line.add(waiting(number, queued=float(number)))
    line.add(waiting(0, queued=0.5, preemptions=1))
    assert numbers(line, 100.0) == [0, 1, 2, 3]


def test_the_least_slack_goes_first_and_who_cannot_make_it_any_more_last() -> None:
    line = WaitingLine()
    for number, start_by in ((1, math.inf), (2, 9.0), (3, 5.0), (4, 1.0)):
        line.add(waiting(number, queued=0.0), start_by)
    assert numbers(line, 0.5) == [4, 3, 2, 1]
    assert numbers(line, 2.0) == [3, 2, 1, 4]
    line.check([1, 2, 3, 4])


def test_a_target_counts_when_its_slack_is_short() -> None:
    """A deadline that is far away moves nobody forward; it does when the request has waited for long."""
    line = WaitingLine()
    line.add(waiting(1))
    line.add(waiting(2, queued=1.0), 60.0)
    line.add(waiting(3, queued=1.0), 50.0)
    line.add(waiting(4, queued=2.0))
    assert numbers(line, 2.0) == [1, 2, 3, 4]
    assert numbers(line, 41.0) == [1, 3, 2, 4]
    line.admit(1)
    assert numbers(line, 41.0) == [3, 2, 4]
    assert numbers(line, 55.0) == [2, 3, 4]


def test_a_priority_counts_as_waiting_longer() -> None:
    line = WaitingLine()
    line.add(waiting(1))
    line.add(waiting(2, queued=0.5 * PRIORITY_SECONDS, priority=1))
    line.add(waiting(3, queued=1.5 * PRIORITY_SECONDS, priority=1))
    line.add(waiting(4, queued=1.5 * PRIORITY_SECONDS, priority=-1))
    assert numbers(line, 2 * PRIORITY_SECONDS) == [2, 1, 3, 4]


def test_one_admission_in_four_goes_to_who_is_overdue() -> None:
    line = WaitingLine()
    now = PATIENCE_SECONDS + 1.0
    line.add(waiting(1))
    line.add(waiting(2, queued=now))
    for number in range(10, 20):
        line.add(waiting(number, queued=now), now + number / 10)
    assert numbers(line, now)[0] == 1
    line.admit(10)
    assert numbers(line, now)[:5] == [11, 12, 13, 1, 14]


def test_while_a_preempted_request_waits_its_tenant_goes_by_arrival() -> None:
    line = WaitingLine()
    line.add(waiting(2, queued=2.0), 4.0)
    line.add(waiting(1, queued=1.0, preemptions=1, has_token=True), 3.0)
    assert numbers(line, 2.0) == [1, 2]


def test_who_was_preempted_again_goes_before_all_tenants() -> None:
    line = WaitingLine()
    line.add(waiting(1, tenant="a"), 1.0)
    line.add(waiting(2, tenant="b", preemptions=MOST_PREEMPTIONS))
    line.shares.charge("b", prompt_tokens=1 << 20)
    assert numbers(line) == [2, 1]


def test_the_tenant_with_less_service_goes_first() -> None:
    line = WaitingLine()
    for number in range(4):
        line.add(waiting(number, tenant="flood"), 1.0)
    line.shares.charge("flood", answer_tokens=DEFAULT_CREDIT_TOKENS)
    line.add(waiting(9, tenant="small", queued=1.0))
    assert numbers(line) == [9, 0, 1, 2, 3]


def test_within_the_credit_tenants_go_by_slack() -> None:
    line = WaitingLine()
    line.add(waiting(1, tenant="a"), 3.0)
    line.add(waiting(2, tenant="b"), 2.0)
    line.add(waiting(3, tenant="a"), 1.0)
    line.shares.charge("a", prompt_tokens=DEFAULT_CREDIT_TOKENS - 1)
    assert numbers(line) == [3, 2, 1]


def test_what_a_plan_admits_counts_within_it() -> None:
    line = WaitingLine()
    for number in range(3):
        line.add(waiting(number, tenant="a", tokens=DEFAULT_CREDIT_TOKENS), 1.0)
    line.add(waiting(9, tenant="b"), 2.0)
    assert numbers(line) == [0, 9, 1, 2]


_arrivals = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.integers(-2, 2),
    st.sampled_from([math.inf, 1.0, 3.0]),
    st.integers(32, 64),
)


@settings(deadline=None, max_examples=30)
@given(
    before=st.lists(_arrivals, max_size=12),
    victim=_arrivals,
    cycle=st.lists(_arrivals, min_size=1, max_size=5),
)
def test_nobody_starves_however_many_come_later(
    before: list[tuple[str, int, float, int]],
    victim: tuple[str, int, float, int],
    cycle: list[tuple[str, int, float, int]],
) -> None:
    """One admission a second and one arrival a second, so that there is always somebody with a target to prefer.

    The victim is behind those that came before it and those whose priority makes up for coming later. Of its tenant's
    admissions one in ``OVERDUE_TURN`` goes the line of these, and until its tenant's turn comes each other tenant can
    be served the credit more.
    """
    line = WaitingLine()
    for number, drawn in enumerate([*before, victim]):
        _arrive(line, number, drawn, 0.0)
    ahead = len(before) + PATIENCE_SECONDS + 4 * PRIORITY_SECONDS
    bound = OVERDUE_TURN * (ahead + 1) * 3 + 2 * 3 * DEFAULT_CREDIT_TOKENS // 32
    now, target = 0.0, len(before)
    while True:
        line.advance(now)
        first = next(line.order(now))
        line.admit(first.number)
        line.shares.stop_running(first.level.tenant)
        if first.number == target:
            return
        now += 1.0
        assert now <= bound, "it was passed over for ever"
        _arrive(line, target + int(now), cycle[int(now) % len(cycle)], now)


def _arrive(line: WaitingLine, number: int, drawn: tuple[str, int, float, int], now: float) -> None:
    tenant, priority, slack, tokens = drawn
    line.add(waiting(number, tenant=tenant, priority=priority, queued=now, tokens=tokens), now + slack)


@settings(deadline=None)
@given(
    drawn=st.lists(st.tuples(_arrivals, st.integers(0, 3), st.booleans()), max_size=20),
    gone=st.lists(st.integers(0, 19)),
    now=st.sampled_from([0.0, 2.0, 50.0]),
)
def test_the_order_has_every_request_once(
    drawn: list[tuple[tuple[str, int, float, int], int, bool]], gone: list[int], now: float
) -> None:
    line = WaitingLine()
    there = set()
    for number, ((tenant, priority, slack, tokens), preemptions, has_token) in enumerate(drawn):
        request = waiting(
            number, tenant=tenant, priority=priority, tokens=tokens, preemptions=preemptions, has_token=has_token
        )
        line.add(request, slack)
        there.add(number)
    for number in gone:
        if number in there:
            there.discard(number)
            line.drop(number)
    order = numbers(line, now)
    assert sorted(order) == sorted(there)
    assert [request.number for request in line.by_arrival()] == sorted(there)
    line.check(there)
