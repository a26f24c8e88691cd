"""A benchmark's result in the form in which all benchmarks report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segue.bench.report import Percentiles, Report, Row
from segue.bench.slo.breakdown import Group, count_verdicts, divide, group_of
from segue.bench.slo.run import SloResult

ATTAINMENT = "slo_attainment_fraction"
GOODPUT = "goodput_requests_per_second"


def slo_report(result: SloResult) -> Report:
    """The report. A void result has the run that was void, and no goodput."""
    rows: list[Row] = []
    if result.best is not None and result.void is None:
        rows.append(_value(result, GOODPUT, result.best.requests_per_second, batch=result.best.sent))
    for trial in result.trials:
        low, high = trial.interval
        rows.append(
            _value(
                result, ATTAINMENT, trial.share, batch=trial.sent, low=low, high=high, runs=len(trial.counts),
                requests_per_second=trial.requests_per_second, part="trial",
            )
        )  # fmt: skip
    outcomes = [outcome for run in result.runs for outcome in run.measured]
    if outcomes:
        rate = result.runs[0].requests_per_second
        confidence = result.config.search.confidence
        rows += _group_rows(result, group_of("all", outcomes, confidence), rate, "all")
        for dimension in divide(outcomes, confidence):
            for group in dimension.groups:
                rows += _group_rows(result, group, rate, dimension.name)
            for measure, index in (("jain_index", dimension.jain), ("jain_token_index", dimension.jain_tokens)):
                rows.append(
                    _value(result, measure, index, batch=len(outcomes), requests_per_second=rate, part=dimension.name)
                )
        rows += [
            _value(result, "requests_count", count, batch=len(outcomes), requests_per_second=rate, group=verdict.value)
            for verdict, count in count_verdicts(outcomes).items()
        ]
    for run in result.runs:
        for measure, value in (("send_lag_p99_ms", run.lag.send_p99_ms), ("loop_lag_p99_ms", run.lag.loop_p99_ms)):
            rows.append(
                _value(result, measure, value, batch=len(run.outcomes), requests_per_second=run.requests_per_second)
            )
    return Report.here("slo", settings(result), rows)


def settings(result: SloResult) -> Mapping[str, Any]:
    """The options, the server as it describes itself, and what came of the search."""
    target = dataclasses.asdict(result.target)
    target["adapters"] = len(result.target.adapters)
    return {
        **dataclasses.asdict(result.config),
        "server": target,
        "void": result.void,
        "is_complete": result.is_complete,
        "missed_at_requests_per_second": None if result.above is None else result.above.requests_per_second,
        "churned": dataclasses.asdict(result.churned),
    }


def _group_rows(result: SloResult, group: Group, rate: float, dimension: str) -> Sequence[Row]:
    common: Mapping[str, Any] = {
        "batch": group.sent,
        "requests_per_second": rate,
        "part": dimension,
        "group": group.name,
    }
    rows = [_value(result, ATTAINMENT, group.share, low=group.low, high=group.high, **common)]
    for measure, times in (("ttft_ms", group.ttft_ms), ("tpot_ms", group.tpot_ms)):
        if times:
            rows.append(
                Row(
                    measure=measure,
                    adapters=len(result.adapters),
                    ranks=_ranks(result),
                    mean=float(np.mean(times)),
                    p99=float(np.percentile(times, 99)),
                    **dataclasses.asdict(Percentiles.of(times)),
                    **common,
                )
            )
    return rows


def _value(result: SloResult, measure: str, value: float, *, runs: int = 1, **more: Any) -> Row:
    """A row of a measure that has one value."""
    return Row(
        measure=measure, adapters=len(result.adapters), ranks=_ranks(result), median=value, p10=value, p90=value,
        runs=runs, **more,
    )  # fmt: skip


def _ranks(result: SloResult) -> tuple[int, ...]:
    return tuple(sorted({adapter.rank for adapter in result.adapters}))
