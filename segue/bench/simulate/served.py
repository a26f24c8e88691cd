"""A request on a simulated replica."""

from __future__ import annotations

from dataclasses import dataclass

from segue.bench.simulate.workload import SimulatedRequest
from segue.scheduler.plan import AdmittedRequest, QueuedRequest, ServiceLevel


class SimulationError(Exception):
    """A simulation that cannot go on. The message is one line."""


@dataclass(slots=True)
class Served:
    """A request on a replica. Times are in seconds of the simulation.

    Of its ``tokens``, ``computed`` have KV. ``prompt_rows`` are to be computed before its next token.
    """

    request: SimulatedRequest
    arrived: float
    tokens: int
    prompt_rows: int
    level: ServiceLevel
    preemptions: int = 0
    computed: int = 0
    pages: int = 0
    generated: int = 0
    in_flight: bool = False
    first_token: float | None = None
    finished: float | None = None

    @property
    def number(self) -> int:
        return self.request.number

    @property
    def version_id(self) -> int | None:
        return None if self.request.adapter is None else self.request.adapter.version_id

    @property
    def rank(self) -> int:
        return 0 if self.request.adapter is None else self.request.adapter.rank

    def queued_view(self) -> QueuedRequest:
        """What the scheduler sees of it while it waits."""
        return QueuedRequest(
            number=self.number,
            tokens=self.tokens,
            version_id=self.version_id,
            level=self.level,
            has_token=self.generated > 0,
            preemptions=self.preemptions,
        )

    def admitted_view(self) -> AdmittedRequest:
        """What the scheduler sees of it while it has pages."""
        return AdmittedRequest(
            number=self.number,
            tokens=self.tokens,
            computed_tokens=self.computed,
            pages=self.pages,
            own_pages=self.pages,
            sole_pages=0,
            version_id=self.version_id,
            in_flight=self.in_flight,
            level=self.level,
            generated_tokens=self.generated,
            first_token_seconds=self.first_token,
            preemptions=self.preemptions,
        )
