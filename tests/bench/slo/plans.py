"""Requests and what became of them, for tests."""

from __future__ import annotations

from collections.abc import Mapping

from segue.bench.slo.config import SloClass
from segue.bench.slo.load_client import OK, ClientRecord
from segue.bench.slo.outcome import Outcome, judge
from segue.bench.slo.workload import Adapter, PlannedRequest

BEGIN = 1000.0


def planned(number: int = 0, at_seconds: float = 2.0, **values: object) -> PlannedRequest:
    """A request for ten tokens within 100 ms and 20 ms per token."""
    defaults: dict[str, object] = {
        "number": number,
        "at_seconds": at_seconds,
        "measured": True,
        "adapter": Adapter(name="a", rank=8, decile=1),
        "prompt_tokens": 4,
        "output_tokens": 10,
        "slo": SloClass(ttft_ms=100, tpot_ms=20),
        "tenant": None,
        "prompt_seed": number,
    }
    return PlannedRequest(**(defaults | values))  # type: ignore[arg-type]


def answered(
    request: PlannedRequest,
    *,
    ttft_ms: float = 50.0,
    tpot_ms: float = 10.0,
    sent_late_ms: float = 0.0,
    **values: object,
) -> ClientRecord:
    """The record of a whole answer with these times, counted from when the request was due."""
    due = BEGIN + request.at_seconds
    first = due + ttft_ms / 1e3
    record = ClientRecord(
        number=request.number,
        sent_seconds=due + sent_late_ms / 1e3,
        first_seconds=first,
        last_seconds=first + (request.output_tokens - 1) * tpot_ms / 1e3,
        tokens=request.output_tokens,
        code=OK,
        tier="device",
        queue_seconds=0.001,
    )
    for name, value in values.items():
        setattr(record, name, value)
    return record


def outcome(number: int = 0, *, request: Mapping[str, object] | None = None, **values: object) -> Outcome:
    """What became of a request that was answered so."""
    asked = planned(number, **(request or {}))  # type: ignore[arg-type]
    return judge(asked, answered(asked, **values), BEGIN)  # type: ignore[arg-type]
