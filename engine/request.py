"""A request inside the engine: its state, its tokens, its pages and its times."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from segue.engine.memory.prefix_cache import CachedPage
from segue.engine.messages import Submit
from segue.engine.pending import PendingToken
from segue.engine.sampling import SamplingRow
from segue.engine.timeline import Timeline
from segue.engine.token_counts import TokenCounts
from segue.scheduler.plan import NO_LEVEL, QueuedRequest, ServiceLevel

_MAX_LOST_PASSES = 3


class RequestState(Enum):
    """QUEUED holds no pages. ADMITTED holds pages and computes. ENDING was cancelled or failed while rows of it are in
    a pass; it holds its pages until that pass ends. ENDED holds nothing."""

    QUEUED = "queued"
    ADMITTED = "admitted"
    ENDING = "ending"
    ENDED = "ended"


_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: frozenset({RequestState.ADMITTED, RequestState.ENDED}),
    RequestState.ADMITTED: frozenset({RequestState.QUEUED, RequestState.ENDING, RequestState.ENDED}),
    RequestState.ENDING: frozenset({RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """``token_ids`` is the prompt and what was generated; KV covers the first ``computed_tokens`` of them.

    ``pages`` hold that KV in order; the first are those of ``path``, which the request shares. ``page_keys`` are
    hashes of its prefixes of whole pages; it has claims on those from ``claimed_from`` on, which it is to compute.
    ``cached_prompt_tokens`` of the prompt were there when it was first admitted. ``in_pass`` says that some rows are
    in a pass that has not ended, ``preemptions`` how often it was preempted, ``lost_passes`` how many of its passes
    lost a CPU worker. ``counts`` is there when penalties need it.

    ``flights`` counts the enqueued batches that have rows of it and have not been read: ``ahead_rows`` rows
    together, which bring ``ahead_tokens`` tokens, the last of them ``pending_token``.
    """

    submit: Submit
    timeline: Timeline
    token_ids: list[int]
    level: ServiceLevel = NO_LEVEL
    state: RequestState = RequestState.QUEUED
    pages: list[int] = field(default_factory=list)
    path: list[CachedPage] = field(default_factory=list)
    page_keys: list[int] = field(default_factory=list)
    claimed_from: int = 0
    computed_tokens: int = 0
    cached_prompt_tokens: int = 0
    in_pass: bool = False
    lost_passes: int = 0
    preemptions: int = 0
    flights: int = 0
    ahead_rows: int = 0
    ahead_tokens: int = 0
    pending_token: PendingToken | None = None
    counts: TokenCounts | None = None

    @classmethod
    def of(cls, submit: Submit, level: ServiceLevel = NO_LEVEL) -> Request:
        timeline = Timeline(arrival_seconds=submit.arrival_seconds)
        counts = TokenCounts(submit.prompt_token_ids) if submit.sampling.has_penalties else None
        token_ids = list(submit.prompt_token_ids)
        return cls(submit=submit, timeline=timeline, token_ids=token_ids, level=level, counts=counts)

    @property
    def number(self) -> int:
        return self.submit.number

    @property
    def version_id(self) -> int | None:
        return self.submit.adapter_version_id

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - len(self.submit.prompt_token_ids)

    def queued_view(self) -> QueuedRequest:
        """What the scheduler sees of it while it waits."""
        return QueuedRequest(
            number=self.number,
            tokens=len(self.token_ids),
            version_id=self.version_id,
            level=self.level,
            has_token=self.generated_tokens > 0,
            preemptions=self.preemptions,
            cpu_allowed=self.cpu_allowed,
        )

    @property
    def planned_tokens(self) -> int:
        """Its tokens once all that is under way has been read."""
        return len(self.token_ids) + self.ahead_tokens

    @property
    def planned_computed_tokens(self) -> int:
        """Of how many tokens there will be KV once all that is under way has been read."""
        return self.computed_tokens + self.ahead_rows

    @property
    def is_busy(self) -> bool:
        """Whether it can neither be given rows nor be preempted: it is in a pass, or its last token is under way."""
        return self.in_pass or self.generated_tokens + self.ahead_tokens >= self.submit.max_tokens

    @property
    def cpu_allowed(self) -> bool:
        """Whether its passes may use CPU workers, which have not failed it too often."""
        return self.lost_passes < _MAX_LOST_PASSES

    def sampling_row(self) -> SamplingRow:
        """What the token behind all that is under way is drawn by."""
        position = self.generated_tokens + self.ahead_tokens
        return SamplingRow(params=self.submit.sampling, position=position, counts=self.counts)

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    @property
    def own_pages(self) -> list[int]:
        """The pages that it shares with nobody."""
        return self.pages[len(self.path) :]

    def move_to(self, state: RequestState) -> None:
        """Change the state. Raises ValueError for a change that the transition table does not have."""
        if state not in _TRANSITIONS[self.state]:
            raise ValueError(f"request {self.number} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def check(self, page_tokens: int) -> None:
        """Raise AssertionError where the request contradicts itself."""
        holds_pages = self.state in (RequestState.ADMITTED, RequestState.ENDING)
        assert holds_pages or not self.pages, f"request {self.number} is {self.state.value} and holds pages"
        assert holds_pages or not (self.in_pass or self.flights), (
            f"request {self.number} is {self.state.value}, in flight"
        )
        assert self.computed_tokens <= len(self.pages) * page_tokens, f"request {self.number} has KV beyond its pages"
        assert len(set(self.pages)) == len(self.pages), f"request {self.number} holds a page twice"
        if self.state is RequestState.ADMITTED:
            assert self.computed_tokens < len(self.token_ids), f"request {self.number} has no token left to compute"
