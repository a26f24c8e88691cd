"""A request meets its targets or not, and a run counts or not."""

from __future__ import annotations

import dataclasses

import pytest

from segue.bench.slo.config import SloClass
from segue.bench.slo.load import LoadResult
from segue.bench.slo.load_client import CUT, ClientRecord
from segue.bench.slo.outcome import Lag, Outcome, Verdict, judge, judge_run
from tests.bench.slo.plans import BEGIN, answered, outcome, planned


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, Verdict.MET),
        ({"ttft_ms": 99.9, "tpot_ms": 19.9}, Verdict.MET),
        ({"ttft_ms": 100.1}, Verdict.TTFT),
        ({"tpot_ms": 20.1}, Verdict.TPOT),
        ({"ttft_ms": 500.0, "tpot_ms": 500.0}, Verdict.TTFT),
        ({"code": "RESOURCE_EXHAUSTED", "error": "OverloadedError", "tokens": 0}, Verdict.REFUSED),
        ({"code": "FAILED_PRECONDITION", "error": "SloInfeasibleError", "tokens": 0}, Verdict.REFUSED),
        ({"code": "FAILED_PRECONDITION", "error": "AdapterRejectedError", "tokens": 0}, Verdict.FAILED),
        ({"code": "RESOURCE_EXHAUSTED", "error": "OverloadedError", "tokens": 3}, Verdict.FAILED),
        ({"code": "UNAVAILABLE", "error": "EngineUnavailableError"}, Verdict.FAILED),
        ({"code": "DEADLINE_EXCEEDED"}, Verdict.UNFINISHED),
        ({"code": CUT}, Verdict.UNFINISHED),
        ({"code": CUT, "ttft_ms": 150.0}, Verdict.TTFT),
        ({"tokens": 9}, Verdict.FAILED),
    ],
)
def test_each_request_has_its_verdict(values: dict[str, object], verdict: Verdict) -> None:
    found = outcome(**values)  # type: ignore[arg-type]
    assert found.verdict is verdict
    assert found.met == (verdict is Verdict.MET)


def test_times_count_from_when_the_request_was_due() -> None:
    """A client that was held up for 60 ms does not hide them."""
    found = outcome(ttft_ms=110.0, sent_late_ms=60.0)
    assert found.ttft_seconds == pytest.approx(0.11)
    assert found.send_lag_seconds == pytest.approx(0.06)
    assert found.verdict is Verdict.TTFT


def test_a_target_that_is_not_set_is_not_missed() -> None:
    free = {"slo": SloClass()}
    assert outcome(request=free, ttft_ms=1e6, tpot_ms=1e6).met
    assert not outcome(request=free, code="UNAVAILABLE").met
    assert not outcome(request={"slo": SloClass(ttft_ms=10)}, tpot_ms=1e6).met


def test_one_token_has_no_time_per_token() -> None:
    found = outcome(request={"output_tokens": 1})
    assert (found.tpot_seconds, found.verdict) == (None, Verdict.MET)


def test_what_was_never_sent_is_a_miss() -> None:
    found = judge(planned(), None, BEGIN)
    assert (found.verdict, found.ttft_seconds, found.send_lag_seconds) == (Verdict.UNFINISHED, None, 0.0)


def test_a_request_is_late_once_it_cannot_have_met_its_targets() -> None:
    assert SloClass(ttft_ms=100, tpot_ms=20).late_after_seconds(11) == pytest.approx(0.3)
    assert SloClass(ttft_ms=100).late_after_seconds(11) == float("inf")


def run(send_lags_ms: list[float], loop_lags_ms: list[float]) -> tuple[list[Outcome], Lag]:
    requests = [planned(number, float(number)) for number in range(len(send_lags_ms))]
    records = {
        request.number: answered(request, sent_late_ms=lag, ttft_ms=50 + lag)
        for request, lag in zip(requests, send_lags_ms, strict=True)
    }
    result = LoadResult(begin_seconds=BEGIN, records=records, loop_lags_seconds=[lag / 1e3 for lag in loop_lags_ms])
    judged = judge_run(5.0, requests, result)
    return list(judged.outcomes), judged.lag


def test_a_run_whose_clients_kept_up_counts() -> None:
    _, lag = run([1.0] * 990 + [500.0] * 9, [0.5] * 100)
    assert lag.send_p99_ms == pytest.approx(1.0)
    assert lag.problem(10.0) is None


def test_a_run_that_was_sent_late_is_void() -> None:
    _, lag = run([1.0] * 90 + [50.0] * 10, [0.5] * 100)
    assert lag.problem(10.0) == (
        "the clients lag behind their schedule: requests were sent 50.0 ms late (p99), the bound is 10 ms"
    )
    assert lag.problem(60.0) is None


def test_a_run_whose_event_loops_stood_still_is_void() -> None:
    _, lag = run([1.0] * 100, [0.1] * 50 + [30.0] * 50)
    problem = lag.problem(10.0)
    assert problem is not None
    assert "event loops were 30.0 ms late" in problem


def test_only_the_measured_part_is_counted() -> None:
    requests = [planned(0, measured=False), planned(1), planned(2)]
    records = {request.number: answered(request) for request in requests[:2]}
    judged = judge_run(5.0, requests, LoadResult(begin_seconds=BEGIN, records=records, loop_lags_seconds=[]))
    assert [each.verdict for each in judged.measured] == [Verdict.MET, Verdict.UNFINISHED]
    assert len(judged.outcomes) == 3


def test_records_have_the_fields_of_their_lines() -> None:
    record = ClientRecord(number=3, sent_seconds=1.5)
    assert ClientRecord(**dataclasses.asdict(record)) == record
