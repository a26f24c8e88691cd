from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.engine.lora import read_order
from segue.engine.lora import read_words as at


class Order:
    """A board whose reads have names."""

    def __init__(self) -> None:
        self._board = np.zeros(at.BOARD_SLOTS, dtype=np.int64)
        self._reads: dict[str, at.Words] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._reads

    def add(self, name: str, stride: int = 1) -> None:
        read = self._reads[name] = np.zeros(at.READ_UNREAD, dtype=np.int64)
        read[at.READ_STRIDE] = stride
        read_order.enter(self._board, read)

    def remove(self, name: str) -> None:
        read_order.leave(self._board, self._reads.pop(name))

    def hasten(self, name: str, stride: int) -> None:
        read_order.speed_up(self._board, self._reads[name], stride)

    def first(self) -> str | None:
        address = read_order.whose_turn(self._board)
        return next((name for name, read in self._reads.items() if read.ctypes.data == address), None)

    def charge(self, name: str, parts: int) -> None:
        read_order.charge(self._board, self._reads[name], parts)


def turns(order: Order, count: int, parts: int = 1) -> list[str]:
    """Whose turns come next, each a part of a layer that has so many."""
    taken = []
    for _ in range(count):
        name = order.first()
        assert name is not None
        order.charge(name, parts)
        taken.append(name)
    return taken


def test_those_that_came_together_go_on_side_by_side() -> None:
    order = Order()
    for flow in "abc":
        order.add(flow)
    assert turns(order, 7) == list("abcabca")


def test_a_newcomer_begins_where_the_others_are() -> None:
    order = Order()
    order.add("a")
    turns(order, 20)
    order.add("b")
    assert Counter(turns(order, 10)) == {"a": 5, "b": 5}


def test_a_long_stride_is_served_rarely_and_not_never() -> None:
    order = Order()
    order.add("slow", 4)
    order.add("fast")
    assert Counter(turns(order, 50)) == {"slow": 10, "fast": 40}


def test_a_flow_that_is_hastened_is_served_at_once() -> None:
    order = Order()
    order.add("late", 8)
    order.add("other")
    assert turns(order, 4) == ["late", "other", "other", "other"]
    order.hasten("late", 1)
    assert turns(order, 1) == ["late"]
    assert Counter(turns(order, 9)) == {"late": 5, "other": 4}


def test_a_flow_that_left_has_no_turn() -> None:
    order = Order()
    order.add("a")
    order.add("b")
    turns(order, 1)
    order.remove("b")
    assert "b" not in order
    assert turns(order, 3) == ["a"] * 3
    order.remove("a")
    assert order.first() is None
    order.add("c")
    assert turns(order, 2) == ["c"] * 2


@pytest.mark.parametrize("gone", ["a", "b", "c", "ab", "ac", "bc", "abc"])
def test_whoever_leaves_the_others_stay_in_their_order(gone: str) -> None:
    order = Order()
    for name in "abc":
        order.add(name)
    for name in gone:
        order.remove(name)
    for name in "de":
        order.add(name)
    left = [name for name in "abcde" if name not in gone]
    assert turns(order, 2 * len(left)) == left * 2


def test_layers_are_shared_alike_however_many_parts_they_have() -> None:
    order = Order()
    order.add("a")
    order.add("b")
    taken = []
    for _ in range(30):
        name = order.first()
        assert name is not None
        order.charge(name, 3 if name == "a" else 2)
        taken.append(name)
    assert Counter(taken) == {"a": 18, "b": 12}


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 12)), max_size=60))
def test_whoever_stays_gets_its_share_whoever_else_comes_and_goes(events: list[tuple[str, bool, int]]) -> None:
    """Between two turns of a flow every other one has at most two, or one more for each time that it came anew."""
    order = Order()
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
