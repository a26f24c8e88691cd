"""A forward pass as an object that can rest: between layers, and wherever it waits for weights or deltas."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from segue.cpu_lora import Job
from segue.engine.attention import AttentionStep
from segue.engine.choice import Choice
from segue.engine.lanes import Lane
from segue.engine.lora.apply import Blocked, LoraApplier
from segue.engine.lora.bridge import WorkerLostError
from segue.engine.pending import PendingToken
from segue.engine.request import Request
from segue.engine.timeline import LayerRecord

# A link or a disk that is not at its limit brings the next layer sooner.
_HELD_UP_SECONDS = 0.05


class PassState(Enum):
    """RESTING can go on at once, BLOCKED waits for something. DRAINING is enqueued as far as it will be, but
    the device has not done all of it. Then it is DONE and has logits, LOST a CPU worker, or was CLOSED early."""

    RESTING = "resting"
    BLOCKED = "blocked"
    DRAINING = "draining"
    DONE = "done"
    LOST = "lost"
    CLOSED = "closed"


_TRANSITIONS: dict[PassState, frozenset[PassState]] = {
    PassState.RESTING: frozenset({PassState.RESTING, PassState.BLOCKED, PassState.DRAINING}),
    PassState.BLOCKED: frozenset({PassState.RESTING, PassState.BLOCKED, PassState.DRAINING}),
    PassState.DRAINING: frozenset({PassState.DONE, PassState.LOST, PassState.CLOSED}),
    PassState.DONE: frozenset({PassState.CLOSED}),
    PassState.LOST: frozenset({PassState.CLOSED}),
    PassState.CLOSED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request in a pass: its tokens ``start`` to ``start + count``; the last may be on its way."""

    request: Request
    start: int
    count: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens [count], 0 for one that is on its way: ``pending_token`` of the request stands for it."""
        known = self.request.token_ids[self.start : self.start + self.count]
        return known if len(known) == self.count else [*known, 0]

    @property
    def last_is_pending(self) -> bool:
        """Whether the last of the tokens is on its way."""
        return self.start + self.count > len(self.request.token_ids)


def pending_rows(rows: Sequence[RequestRows]) -> list[tuple[int, PendingToken]]:
    """Of a pass over ``rows``: each row whose token is on its way, and the token."""
    pending = []
    stop = 0
    for item in rows:
        stop += item.count
        if item.last_is_pending:
            if item.request.pending_token is None:
                raise ValueError(f"request {item.request.number} has no token {item.start + item.count - 1}")
            pending.append((stop - 1, item.request.pending_token))
    return pending


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass brought: logits [len(rows), vocab], and by adapter version what ran each layer, if known."""

    rows: tuple[RequestRows, ...]
    logits: Tensor
    records: Mapping[int, list[LayerRecord]]


Sample = Callable[[Sequence[RequestRows], Tensor], Choice]
"""Has the tokens chosen of a pass over these rows by its logits [len(rows), vocab]."""


class ForwardPass:
    """Rows of one or more requests on their way through the layers. Drive it inside ``torch.inference_mode()``.

    ``run`` is the model's generator; it yields between layers and whenever ``applier`` is blocked, and returns logits
    [len(rows), vocab], one row for the last token of each request's rows. ``sample``, if given, is called in the pass's
    lane when its logits are enqueued. ``attention`` is closed with the pass, if it is given. Its pages may not change
    hands before it is DONE, LOST or CLOSED; then ``end`` is called once.
    """

    def __init__(
        self,
        rows: tuple[RequestRows, ...],
        applier: LoraApplier,
        attention: AttentionStep | None,
        run: Generator[None, None, Tensor],
        lane: Lane,
        sample: Sample | None,
        end: Callable[[], None],
    ) -> None:
        self.rows = rows
        self.state = PassState.RESTING
        self._applier = applier
        self._attention = attention
        self._run = run
        self._lane = lane
        self._sample = sample
        self._choice: Choice | None = None
        self._end = end
        self._end_state = PassState.CLOSED
        self._logits: Tensor | None = None

    @property
    def applier(self) -> LoraApplier:
        return self._applier

    @property
    def result(self) -> PassResult:
        """What a DONE pass brought."""
        if self._logits is None:
            raise ValueError(f"the pass is {self.state.value}: it has no result")
        return PassResult(self.rows, self._logits, self._applier.records)

    @property
    def choice(self) -> Choice:
        """The tokens that a DONE pass brought."""
        if self._choice is None:
            raise ValueError(f"the pass is {self.state.value}: it has no tokens")
        return self._choice

    @property
    def job(self) -> Job | None:
        """The CPU job that a BLOCKED pass waits for, if that is what it waits for."""
        return self._applier.job if self._applier.blocked is Blocked.DELTAS else None

    @property
    def is_held_up(self) -> bool:
        """Whether it has been waiting for weights for long, and nobody knows when they come."""
        return self.state is PassState.BLOCKED and self._applier.awaited_seconds > _HELD_UP_SECONDS

    @property
    def awaits_copies(self) -> bool:
        """Whether it may go on once copies have been enqueued: it rests until it knows where its deltas come from."""
        return self.state is PassState.BLOCKED and self._applier.blocked in (Blocked.WEIGHTS, Blocked.DEVICE)

    @property
    def can_go_on(self) -> bool:
        """Whether ``advance`` may bring it further with nothing coming from outside but the device's own progress."""
        return self.state is PassState.RESTING or self.must_look_again

    @property
    def must_look_again(self) -> bool:
        """Whether it waits for the device, or for a slot of a job that is over, which wake nobody."""
        return self.awaits_device or (self.state is PassState.BLOCKED and self._applier.blocked is Blocked.SLOT)

    @property
    def awaits_device(self) -> bool:
        """Whether it goes on when the device has got further."""
        is_blocked = self.state is PassState.BLOCKED and self._applier.blocked is Blocked.DEVICE
        return self.state is PassState.DRAINING or is_blocked

    @property
    def device_is_there(self) -> bool:
        """Whether the device has done what the pass waits for, where it waits for that."""
        if self.state is PassState.DRAINING:
            return self._lane.is_quiet
        return self._applier.blocked is Blocked.DEVICE and self._lane.is_close

    def advance(self, max_layers: int | None) -> PassState:
        """Go on for ``max_layers`` layers (None: to the end), or until something is not there yet."""
        if self.state in (PassState.RESTING, PassState.BLOCKED):
            with self._lane.enter():
                self._enqueue(max_layers)
        if self.state is PassState.DRAINING and self._lane.is_quiet:
            is_lost = self._end_state is PassState.DONE and self._applier.has_lost_worker
            end_state = PassState.LOST if is_lost else self._end_state
            self._move_to(end_state)
            if end_state is PassState.DONE:
                waiting = [item.request.number for item in self.rows if item.request.generated_tokens == 0]
                self._applier.conclude(waiting, self._lane.layer_seconds)
            self._end()
        return self.state

    def close(self) -> None:
        """Give the pass up wherever it is; ``advance`` tells when it is CLOSED."""
        if self.state in (PassState.RESTING, PassState.BLOCKED):
            with self._lane.enter():
                self._run.close()
                self._drain(PassState.CLOSED)
        elif self.state is PassState.DRAINING:
            self._end_state = PassState.CLOSED
        elif self.state is not PassState.CLOSED:
            self._move_to(PassState.CLOSED)

    def _enqueue(self, max_layers: int | None) -> None:
        layers = 0
        while self.state in (PassState.RESTING, PassState.BLOCKED):
            try:
                next(self._run)
            except StopIteration as end:
                self._logits = end.value
                if self._sample is not None:
                    self._choice = self._sample(self.rows, end.value)
                self._drain(PassState.DONE)
            except WorkerLostError:
                self._drain(PassState.LOST)
            else:
                blocked = self._applier.blocked is not Blocked.NOTHING
                self._move_to(PassState.BLOCKED if blocked else PassState.RESTING)
                layers += 1
                if blocked or layers == max_layers:
                    break

    def _drain(self, end_state: PassState) -> None:
        self._applier.close()
        if self._attention is not None:
            self._attention.close()
        self._lane.end()
        self._end_state = end_state
        self._move_to(PassState.DRAINING)

    def _move_to(self, state: PassState) -> None:
        if state not in _TRANSITIONS[self.state]:
            raise ValueError(f"a pass cannot go from {self.state.value} to {state.value}")
        self.state = state
