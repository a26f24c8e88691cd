"""A forward pass as an object that can rest: between layers, and wherever it waits for weights or deltas."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from segue.cpu_lora import Job
from segue.engine.attention import AttentionStep
from segue.engine.lora.apply import Blocked, LoraApplier
from segue.engine.lora.bridge import WorkerLostError
from segue.engine.pending import PendingToken
from segue.engine.request import Request
from segue.engine.timeline import LayerRecord


class PassState(Enum):
    """RESTING can go on at once, BLOCKED waits for weights or deltas, DONE has logits, LOST lost a CPU worker."""

    RESTING = "resting"
    BLOCKED = "blocked"
    DONE = "done"
    LOST = "lost"


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
    """What a pass brought: logits float32 [len(rows), vocab], and by adapter version what ran each layer, if known."""

    rows: tuple[RequestRows, ...]
    logits: Tensor
    records: Mapping[int, list[LayerRecord]]


class ForwardPass:
    """Rows of one or more requests on their way through the layers. Drive it inside ``torch.inference_mode()``.

    ``run`` is the model's generator; it yields between layers and whenever ``applier`` is blocked, and returns logits
    [len(rows), vocab], one row for the last token of each request's rows. ``attention`` is closed with the pass.
    """

    def __init__(
        self,
        rows: tuple[RequestRows, ...],
        version_id: int | None,
        applier: LoraApplier,
        attention: AttentionStep,
        run: Generator[None, None, Tensor],
    ) -> None:
        """``version_id`` is the adapter that was still loading at the start, None for a warm pass."""
        self.rows = rows
        self.version_id = version_id
        self.state = PassState.RESTING
        self._applier = applier
        self._attention = attention
        self._run = run
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
    def job(self) -> Job | None:
        """The CPU job that a BLOCKED pass waits for, if that is what it waits for."""
        return self._applier.job if self._applier.blocked is Blocked.DELTAS else None

    def advance(self, max_layers: int | None) -> PassState:
        """Go on for ``max_layers`` layers (None: to the end), or until something is not there yet."""
        layers = 0
        while self.state in (PassState.RESTING, PassState.BLOCKED):
            try:
                next(self._run)
            except StopIteration as end:
                self._logits = end.value
                self._attention.close()
                self.state = PassState.DONE
            except WorkerLostError:
                self._applier.close()
                self._attention.close()
                self.state = PassState.LOST
            else:
                blocked = self._applier.blocked is not Blocked.NOTHING
                self.state = PassState.BLOCKED if blocked else PassState.RESTING
                layers += 1
                if blocked or layers == max_layers:
                    break
        return self.state

    def close(self) -> None:
        """Give the pass up wherever it rests."""
        if self.state in (PassState.RESTING, PassState.BLOCKED):
            self._attention.close()
        self._run.close()
        self._applier.close()
