"""The requests of an engine: who waits in which order, who computes, and how many of them use an adapter."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Sequence

from segue.engine.request import Request, RequestState
from segue.scheduler.plan import QueuedRequest
from segue.scheduler.waiting import WaitingLine


def _no_target(_request: QueuedRequest) -> float:
    return math.inf


class RequestTable:
    """All requests that have not ended. The queue is in the order of arrival, also after preemptions.

    ``waiting`` has the queue in the orders that a policy needs.
    """

    def __init__(self, start_by: Callable[[QueuedRequest], float] = _no_target) -> None:
        """``start_by`` tells when a request's prefill must begin to be in time."""
        self._start_by = start_by
        self.waiting = WaitingLine()
        self._by_number: dict[int, Request] = {}
        self._queue: list[Request] = []
        self._admitted: dict[int, Request] = {}

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    @property
    def queue(self) -> list[Request]:
        """QUEUED requests in the order of arrival."""
        return self._queue

    @property
    def admitted(self) -> list[Request]:
        """ADMITTED and ENDING requests in the order of admission."""
        return list(self._admitted.values())

    def get(self, number: int) -> Request | None:
        """The request, or None when it has ended or never was."""
        return self._by_number.get(number)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises ValueError for a number that is in use."""
        if request.number in self._by_number:
            raise ValueError(f"request number {request.number} is in use")
        self._by_number[request.number] = request
        self._enqueue(request)

    def admit(self, request: Request) -> None:
        """A queued request may hold pages and compute."""
        request.move_to(RequestState.ADMITTED)
        self._queue.remove(request)
        self.waiting.admit(request.number, cached_tokens=request.computed_tokens)
        self._admitted[request.number] = request

    def preempt(self, request: Request) -> None:
        """Send an admitted request, which has given its pages back, to its place in the queue."""
        request.move_to(RequestState.QUEUED)
        del self._admitted[request.number]
        self.waiting.shares.stop_running(request.level.tenant)
        request.preemptions += 1
        self._enqueue(request)

    def end(self, request: Request) -> None:
        """Forget a request, which has given its pages back."""
        if request.state is RequestState.QUEUED:
            self._queue.remove(request)
            self.waiting.drop(request.number)
        else:
            del self._admitted[request.number]
            self.waiting.shares.stop_running(request.level.tenant)
        request.move_to(RequestState.ENDED)
        del self._by_number[request.number]

    def versions_in_use(self) -> set[int]:
        """Adapter versions that admitted requests need on the device."""
        return {request.version_id for request in self._admitted.values() if request.version_id is not None}

    def before(self, request: QueuedRequest, start_by_seconds: float) -> Sequence[QueuedRequest]:
        """Requests of its tenant that would be admitted before one that is to be queued."""
        level = request.level
        return tuple(self.waiting.before(level.tenant, start_by_seconds, level.priority))

    def check(self, page_tokens: int) -> None:
        """Raise AssertionError where the table contradicts itself."""
        numbers = [request.number for request in self._queue]
        assert numbers == sorted(numbers), "the queue is out of order"
        assert set(numbers) | set(self._admitted) == set(self._by_number), "a request is in no list"
        assert not set(numbers) & set(self._admitted), "a request is both queued and admitted"
        self.waiting.check(numbers)
        for request in self._by_number.values():
            request.check(page_tokens)

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self._queue, request, key=lambda item: item.number)
        view = request.queued_view()
        self.waiting.add(view, self._start_by(view))
