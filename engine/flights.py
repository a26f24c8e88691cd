"""Batches whose tokens are on their way: chosen on the device, not yet read by the engine.

Where the device runs beside the engine, a step is planned and enqueued while the step before it runs. The plan needs
no token for that, only how many there are. So a request knows what is under way (``Request.ahead_rows``,
``ahead_tokens``), and the next rows of it take their token where the sampler left it, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segue.engine.choice import Choice
from segue.engine.device_time import BatchSpan
from segue.engine.forward_pass import PassResult, RequestRows
from segue.engine.pending import PendingToken
from segue.engine.request import Request
from segue.engine.sampler import Sampler
from segue.engine.sampling import SampledToken
from segue.scheduler.cost_model import StepLoad


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A batch that was enqueued to its end. ``loads`` are of its rows that decode and its rows of prompts, of a batch
    whose time is to be learned from; ``span`` is its time on the device, where that runs beside the host."""

    result: PassResult
    choice: Choice
    start_seconds: float
    loads: tuple[StepLoad, StepLoad] | None = None
    span: BatchSpan | None = None

    def __iter__(self) -> Iterator[RequestRows]:
        return iter(self.result.rows)

    @property
    def row_count(self) -> int:
        """Rows of all requests together."""
        return sum(rows.count for rows in self.result.rows)

    @property
    def needs_reading(self) -> bool:
        """Whether the next token of a request depends on this one in a way that only the engine can tell."""
        return any(request.counts is not None for request in self.choice.wanted)


class Flights:
    """Flights in the order in which they were enqueued."""

    def __init__(self, sampler: Sampler, clock: Callable[[], float]) -> None:
        self._sampler = sampler
        self._clock = clock
        self._flights: list[Flight] = []

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    def sample(self, rows: Sequence[RequestRows], logits: Tensor) -> Choice:
        """Have the sampler choose the tokens of the requests of which all rows are computed with a pass over ``rows``,
        of which ``logits`` are [len(rows), vocab]. It is enqueued behind these."""
        chosen = [
            (index, item.request)
            for index, item in enumerate(rows)
            if item.start + item.count == item.request.planned_tokens
        ]
        tokens = None
        if chosen:
            wanted = _rows_of(logits, [index for index, _ in chosen])
            tokens = self._sampler.launch(wanted, [request.sampling_row() for _, request in chosen])
        return Choice(tuple(request for _, request in chosen), tokens)

    def launch(
        self,
        result: PassResult,
        start_seconds: float,
        loads: tuple[StepLoad, StepLoad] | None = None,
        span: BatchSpan | None = None,
    ) -> Flight:
        """Have the sampler choose the tokens of a batch, and know of its requests what is under way."""
        choice = self.sample(result.rows, result.logits)
        flight = Flight(result, choice, start_seconds, loads, span)
        for rows in flight:
            rows.request.flights += 1
            rows.request.ahead_rows += rows.count
        if choice.tokens is not None:
            for place, request in enumerate(choice.wanted):
                request.ahead_tokens += 1
                request.pending_token = PendingToken(choice.tokens.token_ids, place)
        self._flights.append(flight)
        return flight

    def land(self, flight: Flight) -> list[tuple[Request, SampledToken | None]]:
        """Wait for a flight, the first of all; each request that it has a token for, None where none can be chosen."""
        if flight is not self._flights[0]:
            raise ValueError("flights end in the order in which they were enqueued")
        chosen = flight.choice.read()
        del self._flights[0]
        for rows in flight:
            rows.request.flights -= 1
            rows.request.ahead_rows -= rows.count
        for request in flight.choice.wanted:
            request.ahead_tokens -= 1
            if request.ahead_tokens == 0:
                request.pending_token = None
        return chosen

    def check(self) -> None:
        """Raise AssertionError unless requests and flights agree on what is under way."""
        for request in {rows.request for flight in self._flights for rows in flight}:
            own = [rows for flight in self._flights for rows in flight if rows.request is request]
            wanted = sum(request in flight.choice.wanted for flight in self._flights)
            assert request.flights == len(own), f"request {request.number}: {request.flights} flights, not {len(own)}"
            assert request.ahead_rows == sum(rows.count for rows in own), f"request {request.number}: rows under way"
            assert request.ahead_tokens == wanted, f"request {request.number}: tokens under way"
            assert (request.pending_token is not None) == (wanted > 0), f"request {request.number}: pending token"


def _rows_of(logits: Tensor, indices: list[int]) -> Tensor:
    """These rows of ``logits``; does not wait for the device."""
    if len(indices) == len(logits):
        return logits
    index = torch.tensor(indices)
    if logits.is_cuda:
        # From memory that is not pinned a copy waits for all that its stream has before it, weights included.
        index = index.pin_memory().to(logits.device, non_blocking=True)
    return logits.index_select(0, index)
