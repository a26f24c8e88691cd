"""A cluster of replicas as a heap of events: arrivals, and the ends of steps, passes and copies."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from segue.bench.simulate.config import ReplicaConfig, Targets
from segue.bench.simulate.device import Flight
from segue.bench.simulate.replica import Replica
from segue.bench.simulate.served import Served
from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.placement import PlacementPolicy, PlacementRequest


class _Event(IntEnum):
    """What happens. At one time in this order, so that a step begins with all that is there."""

    LANDING = 0
    PASS_END = 1
    STEP_END = 2
    ARRIVAL = 3


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """All requests, in the order of arrival, and what else was counted."""

    served: Sequence[Served]
    replica_of: Sequence[int]
    steps: int
    preemptions: int
    seconds: float


@dataclass(slots=True)
class Cluster:
    """Runs requests through replicas that a policy chooses between."""

    config: ReplicaConfig
    replicas: int
    policy: PlacementPolicy
    targets: Targets
    check: bool = False
    _heap: list[tuple[float, _Event, int, int, object]] = field(default_factory=list)
    _sequence: int = 0
    _steps: int = 0

    def run(self, requests: Sequence[SimulatedRequest], requests_per_second: float) -> ClusterRun:
        """Serve all requests to their end, with so many arrivals a second on average.

        Raises SimulationError for a request that no replica could hold.
        """
        replicas = [Replica(self.config, self.targets) for _ in range(self.replicas)]
        served: list[Served] = []
        replica_of: list[int] = []
        now = 0.0
        arrivals = iter(requests)
        self._push_arrival(next(arrivals, None), requests_per_second)
        while self._heap:
            now, event, _, place, subject = heapq.heappop(self._heap)
            if event is _Event.ARRIVAL:
                assert isinstance(subject, SimulatedRequest)
                place = self.policy.choose(self._to_place(subject), replicas)
                served.append(replicas[place].submit(subject, now))
                replica_of.append(place)
                self._push_arrival(next(arrivals, None), requests_per_second)
            else:
                self._end(event, replicas[place], subject, now)
            self._go_on(replicas[place], place, now)
        preemptions = sum(replica.preemptions for replica in replicas)
        return ClusterRun(served, replica_of, self._steps, preemptions, now)

    def _to_place(self, request: SimulatedRequest) -> PlacementRequest:
        return PlacementRequest(
            number=request.number,
            prompt_tokens=request.prompt_tokens,
            adapter=request.adapter,
            time_per_token_seconds=self.targets.step_seconds,
        )

    def _push(self, at: float, event: _Event, place: int, subject: object) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at, event, self._sequence, place, subject))

    def _push_arrival(self, request: SimulatedRequest | None, requests_per_second: float) -> None:
        if request is not None:
            self._push(request.arrival / requests_per_second, _Event.ARRIVAL, 0, request)

    @staticmethod
    def _end(event: _Event, replica: Replica, subject: object, now: float) -> None:
        match event:
            case _Event.STEP_END:
                replica.end_step(now)
            case _Event.PASS_END:
                assert isinstance(subject, Flight)
                replica.end_flight(subject, now)
            case _:
                assert isinstance(subject, int)
                replica.land(subject)

    def _go_on(self, replica: Replica, place: int, now: float) -> None:
        """Begin the replica's next step, unless one is under way."""
        if replica.is_busy:
            return
        begun = replica.start_step(now)
        for version_id, lands in begun.landings:
            self._push(lands, _Event.LANDING, place, version_id)
        for flight in begun.flights:
            self._push(flight.ends, _Event.PASS_END, place, flight)
        if begun.ends is not None:
            self._steps += 1
            self._push(begun.ends, _Event.STEP_END, place, None)
        if self.check:
            replica.check()
