from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.engine.lora.fair_order import FairOrder


def turns(order: FairOrder[str], count: int) -> list[str]:
    taken = []
    for _ in range(count):
        flow = order.first()
        assert flow is not None
        order.charge(flow, 1)
        taken.append(flow)
    return taken


def test_those_that_came_together_go_on_side_by_side() -> None:
    order: FairOrder[str] = FairOrder()
    for flow in "abc":
        order.add(flow)
    assert turns(order, 7) == list("abcabca")


def test_a_newcomer_begins_where_the_others_are() -> None:
    order: FairOrder[str] = FairOrder()
    order.add("a")
    turns(order, 20)
    order.add("b")
    assert Counter(turns(order, 10)) == {"a": 5, "b": 5}


def test_a_long_stride_is_served_rarely_and_not_never() -> None:
    order: FairOrder[str] = FairOrder()
    order.add("slow", 4.0)
    order.add("fast", 1.0)
    assert Counter(turns(order, 50)) == {"slow": 10, "fast": 40}


def test_a_flow_that_is_hastened_is_served_at_once() -> None:
    order: FairOrder[str] = FairOrder()
    order.add("late", 8.0)
    order.add("other", 1.0)
    assert turns(order, 4) == ["late", "other", "other", "other"]
    order.hasten("late", 1.0)
    assert turns(order, 1) == ["late"]
    assert Counter(turns(order, 9)) == {"late": 5, "other": 4}


def test_a_flow_that_left_has_no_turn() -> None:
    order: FairOrder[str] = FairOrder()
    order.add("a")
    order.add("b")
    turns(order, 1)
    order.remove("b")
    assert "b" not in order
    assert turns(order, 3) == ["a"] * 3
    order.remove("a")
    assert order.first() is None
    with pytest.raises(KeyError):
        order.remove("a")
    order.add("a")
    with pytest.raises(ValueError, match="is in the order"):
        order.add("a")


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 12)), max_size=60))
def test_whoever_stays_gets_its_share_whoever_else_comes_and_goes(events: list[tuple[str, bool, int]]) -> None:
    """Between two turns of a flow every other one has at most two, or one more for each time that it came anew."""
    order: FairOrder[str] = FairOrder()
    order.add("stays")
    since: Counter[str] = Counter()
    arrivals: Counter[str] = Counter()
    for flow, comes, count in events:
        if comes and flow not in order:
            order.add(flow)
            arrivals[flow] += 1
        elif not comes and flow in order:
            order.remove(flow)
        for taken in turns(order, count):
            since[taken] += 1
            if taken == "stays":
                since.clear()
                arrivals.clear()
            assert all(since[other] <= 2 + arrivals[other] for other in since)
