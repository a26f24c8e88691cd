"""The requests that wait on a simulated replica."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from segue.bench.simulate.config import ReplicaConfig
from segue.bench.simulate.served import Served
from segue.scheduler.plan import QueuedRequest, pages_for
from segue.scheduler.policy import PolicyName, StepPolicy, prompt_seconds, step_order
from segue.scheduler.waiting import WaitingLine


class SimulatedQueue:
    """In the order of arrival: one that was preempted comes before those that arrived later."""

    def __init__(self, config: ReplicaConfig) -> None:
        self._config = config
        self._requests: list[Served] = []
        self._waiting = WaitingLine()
        self.pages = 0
        """What the requests would take at once, each with a page to grow into."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Served]:
        return iter(self._requests)

    def add(self, served: Served) -> None:
        """Queue a request that has arrived, or that was preempted."""
        bisect.insort(self._requests, served, key=lambda item: item.number)
        by_seconds = served.level.first_token_by_seconds
        prompt = prompt_seconds(self._config.profile, served.tokens, 0, served.level)
        self._waiting.add(served.queued_view(), by_seconds - prompt)
        self.pages += self._pages_of(served)

    def admit(self, number: int) -> Served:
        """Take the request out; it runs from now on."""
        place = bisect.bisect_left(self._requests, number, key=lambda item: item.number)
        served = self._requests.pop(place)
        self._waiting.admit(number)
        self.pages -= self._pages_of(served)
        return served

    def charge(self, served: Served, answer_tokens: int) -> None:
        """Count what a running request's tenant was given."""
        self._waiting.shares.charge(served.level.tenant, answer_tokens=answer_tokens)

    def stop_running(self, served: Served) -> None:
        """A request that was admitted runs no more."""
        self._waiting.shares.stop_running(served.level.tenant)

    def order(self, now: float) -> tuple[Iterator[QueuedRequest], StepPolicy]:
        """The queue in the order of admission now, and its policy."""
        return step_order(PolicyName(self._config.policy), self._waiting, now=now, profile=self._config.profile)

    def check(self) -> None:
        """Raises AssertionError where sums or the scheduler's line disagree."""
        assert self.pages == sum(self._pages_of(item) for item in self._requests)
        self._waiting.check([item.number for item in self._requests])

    def _pages_of(self, served: Served) -> int:
        return pages_for(served.tokens, self._config.limits.page_tokens) + 1
