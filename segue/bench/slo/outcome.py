"""What became of each request, and of a whole run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from segue.bench.slo.load import LoadResult
from segue.bench.slo.load_client import CUT, OK, ClientRecord
from segue.bench.slo.workload import PlannedRequest
from segue.errors import OverloadedError, SloInfeasibleError

_LATE_CODES = (CUT, "DEADLINE_EXCEEDED")
_REFUSALS = (OverloadedError.__name__, SloInfeasibleError.__name__)


class Verdict(StrEnum):
    """Whether a request met its targets, and if not, why: which was missed first, or how it failed. UNFINISHED were
    given up, by the deadline or at the end of the run."""

    MET = "met"
    TTFT = "late first token"
    TPOT = "slow tokens"
    REFUSED = "refused"
    FAILED = "failed"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A request and what became of it. Times are in seconds; ``ttft_seconds`` counts from when the request was to
    start, not from when it was sent; ``tpot_seconds`` is the mean time per token after the first, None without any."""

    request: PlannedRequest
    record: ClientRecord
    send_lag_seconds: float
    ttft_seconds: float | None
    tpot_seconds: float | None
    verdict: Verdict

    @property
    def met(self) -> bool:
        return self.verdict is Verdict.MET


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How late the clients were, as 99th percentiles in milliseconds: sending, and in their event loops."""

    send_p99_ms: float
    loop_p99_ms: float

    def problem(self, most_lag_ms: float) -> str | None:
        """Why the run is void, None if it is not."""
        for name, value in (("requests were sent", self.send_p99_ms), ("event loops were", self.loop_p99_ms)):
            if value > most_lag_ms:
                return (
                    f"the clients lag behind their schedule: {name} {value:.1f} ms late (p99), the bound is "
                    f"{most_lag_ms:g} ms"
                )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run at one rate. ``outcomes`` are of all requests, those of the warm-up and the cool-down included."""

    requests_per_second: float
    outcomes: Sequence[Outcome]
    lag: Lag

    @property
    def measured(self) -> Sequence[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.request.measured]


def judge(request: PlannedRequest, record: ClientRecord | None, begin_seconds: float) -> Outcome:
    """What became of a request; None is one that was not sent before the run was stopped."""
    due = begin_seconds + request.at_seconds
    if record is None:
        record = ClientRecord(number=request.number, sent_seconds=due)
    ttft = None if record.first_seconds is None else record.first_seconds - due
    tpot = None
    if record.first_seconds is not None and record.last_seconds is not None and record.tokens > 1:
        tpot = (record.last_seconds - record.first_seconds) / (record.tokens - 1)
    return Outcome(
        request=request,
        record=record,
        send_lag_seconds=max(0.0, record.sent_seconds - due),
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        verdict=_verdict(request, record, ttft, tpot),
    )


def _verdict(request: PlannedRequest, record: ClientRecord, ttft: float | None, tpot: float | None) -> Verdict:
    targets = request.slo
    if record.error in _REFUSALS and record.tokens == 0:
        return Verdict.REFUSED
    if record.code not in (OK, *_LATE_CODES):
        return Verdict.FAILED
    if targets.ttft_ms is not None and ttft is not None and 1e3 * ttft > targets.ttft_ms:
        return Verdict.TTFT
    if record.code != OK:
        return Verdict.UNFINISHED
    if record.tokens < request.output_tokens:
        return Verdict.FAILED
    if targets.tpot_ms is not None and tpot is not None and 1e3 * tpot > targets.tpot_ms:
        return Verdict.TPOT
    return Verdict.MET


def judge_run(requests_per_second: float, requests: Sequence[PlannedRequest], result: LoadResult) -> Run:
    """The run of these requests."""
    outcomes = [judge(request, result.records.get(request.number), result.begin_seconds) for request in requests]
    sent = [outcome.send_lag_seconds for outcome in outcomes if outcome.request.number in result.records]
    return Run(
        requests_per_second=requests_per_second,
        outcomes=outcomes,
        lag=Lag(send_p99_ms=_p99_ms(sent), loop_p99_ms=_p99_ms(result.loop_lags_seconds)),
    )


def _p99_ms(seconds: Sequence[float]) -> float:
    return 1e3 * float(np.percentile(seconds, 99)) if len(seconds) else 0.0
