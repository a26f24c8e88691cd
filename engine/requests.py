"""The requests of an engine: who waits in which order, who computes, and how many of them use an adapter."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from segue.engine.request import Request, RequestState


class RequestTable:
    """All requests that have not ended. The queue is in the order of arrival, also after preemptions."""

    def __init__(self) -> None:
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
        self._admitted[request.number] = request

    def preempt(self, request: Request) -> None:
        """Send an admitted request, which has given its pages back, to its place in the queue."""
        request.move_to(RequestState.QUEUED)
        del self._admitted[request.number]
        self._enqueue(request)

    def end(self, request: Request) -> None:
        """Forget a request, which has given its pages back."""
        if request.state is RequestState.QUEUED:
            self._queue.remove(request)
        request.move_to(RequestState.ENDED)
        self._admitted.pop(request.number, None)
        del self._by_number[request.number]

    def versions_in_use(self) -> set[int]:
        """Adapter versions that admitted requests need on the device."""
        return {request.version_id for request in self._admitted.values() if request.version_id is not None}

    def check(self, page_tokens: int) -> None:
        """Raise AssertionError where the table contradicts itself."""
        numbers = [request.number for request in self._queue]
        assert numbers == sorted(numbers), "the queue is out of order"
        assert set(numbers) | set(self._admitted) == set(self._by_number), "a request is in no list"
        assert not set(numbers) & set(self._admitted), "a request is both queued and admitted"
        for request in self._by_number.values():
            request.check(page_tokens)

    def _enqueue(self, request: Request) -> None:
        bisect.insort(self._queue, request, key=lambda item: item.number)
