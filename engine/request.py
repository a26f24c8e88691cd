"""A request inside the engine: its state, its tokens, its pages and its times."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from segue.engine.messages import Submit
from segue.engine.timeline import Timeline


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

    ``pages`` hold that KV in order. ``in_flight`` says that some rows are in a pass that has not ended, ``lost_passes``
    how many of its passes lost a CPU worker.
    """

    submit: Submit
    timeline: Timeline
    token_ids: list[int]
    state: RequestState = RequestState.QUEUED
    pages: list[int] = field(default_factory=list)
    computed_tokens: int = 0
    in_flight: bool = False
    lost_passes: int = 0

    @classmethod
    def of(cls, submit: Submit) -> Request:
        timeline = Timeline(arrival_seconds=submit.arrival_seconds)
        return cls(submit=submit, timeline=timeline, token_ids=list(submit.prompt_token_ids))

    @property
    def number(self) -> int:
        return self.submit.number

    @property
    def version_id(self) -> int | None:
        return self.submit.adapter_version_id

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) - len(self.submit.prompt_token_ids)

    def move_to(self, state: RequestState) -> None:
        """Change the state. Raises ValueError for a change that the transition table does not have."""
        if state not in _TRANSITIONS[self.state]:
            raise ValueError(f"request {self.number} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def check(self, page_tokens: int) -> None:
        """Raise AssertionError where the request contradicts itself."""
        holds_pages = self.state in (RequestState.ADMITTED, RequestState.ENDING)
        assert holds_pages or not self.pages, f"request {self.number} is {self.state.value} and holds pages"
        assert not self.in_flight or holds_pages, f"request {self.number} is {self.state.value} and in flight"
        assert self.computed_tokens <= len(self.pages) * page_tokens, f"request {self.number} has KV beyond its pages"
        assert len(set(self.pages)) == len(self.pages), f"request {self.number} holds a page twice"
        if self.state is RequestState.ADMITTED:
            assert self.computed_tokens < len(self.token_ids), f"request {self.number} has no token left to compute"
