"""Whose turn it is: start-time fair queueing over flows that come and go. Pure."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, TypeVar

_Flow = TypeVar("_Flow", bound=Hashable)


@dataclass(slots=True)
class _Turn:
    tag: float
    number: int
    stride: float


class FairOrder(Generic[_Flow]):
    """Flows in the order of their tags, and of their arrival where those are equal.

    A flow's tag grows by what it is charged times its stride. It begins where the flow is whose turn it was last, so
    those that came together go on side by side, and one that came earlier is never overtaken for good: whoever comes
    later begins where it is (Goyal, Vin, Cheng: Start-time Fair Queueing, SIGCOMM 1996).
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Flow]] = []
        self._turns: dict[_Flow, _Turn] = {}
        self._clock = 0.0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, flow: _Flow) -> bool:
        return flow in self._turns

    def add(self, flow: _Flow, stride: float = 1.0) -> None:
        """Raises ValueError for a flow that is there."""
        if flow in self._turns:
            raise ValueError(f"{flow!r} is in the order")
        self._arrivals += 1
        self._turns[flow] = _Turn(self._clock, self._arrivals, stride)
        self._push(flow)

    def remove(self, flow: _Flow) -> None:
        """Raises KeyError for a flow that is not there."""
        del self._turns[flow]
        if not self._turns:
            self._heap.clear()

    def hasten(self, flow: _Flow, stride: float) -> None:
        """Give a flow another stride, and its next turn as if it came now, unless that is later."""
        turn = self._turns[flow]
        turn.stride = stride
        if turn.tag > self._clock:
            turn.tag = self._clock
            self._push(flow)

    def first(self) -> _Flow | None:
        """The flow whose turn it is."""
        while self._heap:
            tag, number, flow = self._heap[0]
            turn = self._turns.get(flow)
            if turn is not None and (turn.tag, turn.number) == (tag, number):
                return flow
            heappop(self._heap)
        return None

    def charge(self, flow: _Flow, amount: float) -> None:
        """The flow whose turn it was has taken ``amount`` of it."""
        turn = self._turns[flow]
        self._clock = max(self._clock, turn.tag)
        turn.tag += amount * turn.stride
        self._push(flow)

    def _push(self, flow: _Flow) -> None:
        turn = self._turns[flow]
        heappush(self._heap, (turn.tag, turn.number, flow))
