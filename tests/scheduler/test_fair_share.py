"""Tenants' counters: who is lifted, who has a surplus, and who may wait."""

from __future__ import annotations

import pytest

from segue.scheduler.fair_share import MOST_ABSENT_TENANTS, TenantShares


def test_service_counts_an_answers_token_twice() -> None:
    shares = TenantShares()
    shares.wait("a")
    shares.charge("a", prompt_tokens=10, answer_tokens=3)
    assert shares.counters["a"] == 16


def test_a_tenant_that_comes_back_has_saved_up_no_more_than_the_credit() -> None:
    shares = TenantShares(credit_tokens=100)
    shares.wait("busy")
    shares.charge("busy", prompt_tokens=1000)
    shares.wait("new")
    assert shares.counters["new"] == 900
    shares.charge("new", prompt_tokens=500)
    shares.stop_waiting("new")
    shares.wait("new")
    assert shares.counters["new"] == 1400, "counters never fall"


def test_where_nobody_waits_the_last_that_did_counts() -> None:
    shares = TenantShares(credit_tokens=100)
    shares.wait("first")
    shares.charge("first", prompt_tokens=1000)
    shares.stop_waiting("first")
    shares.wait("second")
    assert shares.counters["second"] == 900


def test_a_surplus_takes_more_service_and_more_requests_than_an_equal_part() -> None:
    shares = TenantShares(credit_tokens=100)
    for tenant in ("flood", "flood", "flood", "small"):
        shares.wait(tenant)
    assert shares.surplus() == frozenset(), "nobody was served more"
    shares.charge("flood", prompt_tokens=50)
    assert shares.surplus() == {"flood"}
    shares.wait("small")
    shares.wait("small")
    assert shares.surplus() == frozenset(), "they have equal parts"


def test_a_flood_has_more_than_four_times_the_requests_of_the_others() -> None:
    shares = TenantShares(credit_tokens=100)
    for tenant, requests in (("a", 3), ("b", 1), ("flood", 8)):
        for _ in range(requests):
            shares.wait(tenant)
    assert shares.tenants == 3
    assert shares.floods() == frozenset(), "four times the two that others have on average"
    shares.wait("flood")
    assert shares.floods() == {"flood"}
    assert shares.surplus() == frozenset(), "it was not served more"


def test_running_requests_count_as_much_as_waiting_ones() -> None:
    shares = TenantShares(credit_tokens=100)
    for tenant in ("small", *["flood"] * 5):
        shares.wait(tenant)
        shares.stop_waiting(tenant)
        shares.run(tenant)
    assert shares.tenants == 2
    assert shares.floods() == {"flood"}
    for _ in range(5):
        shares.stop_running("flood")
    assert (shares.tenants, shares.floods()) == (1, frozenset()), "alone nobody is one"


def test_a_tenant_alone_has_no_surplus() -> None:
    shares = TenantShares()
    shares.wait("a")
    shares.charge("a", prompt_tokens=1 << 30)
    assert shares.surplus() == frozenset()


def test_one_tenant_may_fill_the_queue_and_keeps_nobody_else_out() -> None:
    shares = TenantShares()
    for _ in range(8):
        assert shares.may_wait("flood", 8, 8)
        shares.wait("flood")
    assert not shares.may_wait("flood", 8, 8)
    for place in range(4):
        assert shares.may_wait("small", 8, 8), place
        shares.wait("small")
    assert not shares.may_wait("small", 8, 8), "it has an equal part of the queue"


def test_a_quota_bounds_a_tenant_whose_queue_is_not_full() -> None:
    shares = TenantShares()
    for _ in range(3):
        shares.wait("a")
    assert not shares.may_wait("a", 8, 3)
    assert shares.may_wait("b", 8, 3)


def test_the_queue_of_all_is_bounded_however_many_tenants_there_are() -> None:
    shares = TenantShares()
    for number in range(1000):
        tenant = str(number % 50 if number % 3 else 0)
        if shares.may_wait(tenant, 20, 20):
            shares.wait(tenant)
        shares.check()
    assert sum(shares.waiting.values()) == 40
    assert shares.waiting["0"] <= 20


def test_tenants_without_requests_are_forgotten_in_the_end() -> None:
    shares = TenantShares()
    shares.wait("there")
    for number in range(2 * MOST_ABSENT_TENANTS):
        shares.wait(str(number))
        shares.stop_waiting(str(number))
        assert len(shares.counters) <= MOST_ABSENT_TENANTS + 1
    assert "there" in shares.counters


def test_more_requests_cannot_end_than_there_are() -> None:
    with pytest.raises(KeyError):
        TenantShares().stop_running("a")
