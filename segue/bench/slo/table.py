"""A result for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from segue.bench.slo.breakdown import Group, common_problems, count_verdicts, divide, group_of
from segue.bench.slo.run import SloResult


def headline(result: SloResult) -> Sequence[str]:
    """The answer in a line, and what else is to be known of it."""
    config, target = result.config, result.target
    share = f"{config.search.attain:.0%} of the requests in time"
    if result.void is not None:
        lines = ["no result: the run is void"]
    elif config.rate is not None:
        trial = result.trials[0]
        low, high = trial.interval
        lines = [f"{trial.share:.1%} of the requests in time ({low:.1%} to {high:.1%}) at {config.rate:.4g} requests/s"]
    elif result.best is None:
        lowest = min(trial.requests_per_second for trial in result.trials)
        lines = [f"no rate from {lowest:.4g} requests/s on has {share}; a longer --duration tells of lower ones"]
    else:
        best = f"{result.best.requests_per_second:.4g} requests/s with {share}"
        above = result.above
        lines = [f"at least {best}" if above is None else f"{best}; {above.requests_per_second:.4g} has not"]
        if not result.best.is_sure(config.search.attain):
            low, high = result.best.interval
            lines.append(f"not sure: {result.best.share:.1%} were in time there, which may be {low:.1%} to {high:.1%}")
    if result.best is not None and result.void is None and not result.is_complete:
        lines.append("time was over before the search was as near as wanted")
    lines.append(
        f"{target.model} ({target.dtype}) on {target.device} at {target.address}, {len(result.adapters)} adapters"
    )
    return [*lines, *_remarks(result)]


def _remarks(result: SloResult) -> Sequence[str]:
    """What was unusual."""
    remarks = []
    churned = result.churned
    if churned.done or churned.failed:
        cause = "" if churned.last_error is None else f": {churned.last_error}"
        remarks.append(
            f"{churned.done} adapters were taken from the server, {churned.failed} calls for it failed{cause}"
        )
    outcomes = [outcome for run in result.runs for outcome in run.measured]
    cut = sum(outcome.request.is_cut for outcome in outcomes)
    if cut:
        remarks.append(
            f"{cut} of {len(outcomes)} requests were cut to a context of {result.target.context_tokens} tokens"
        )
    return [*remarks, *common_problems(outcomes)]


def show_result(console: Console, result: SloResult) -> None:
    """The answer, every rate that was measured, and who was served how at the rate that is reported."""
    for line in headline(result):
        console.print(line, highlight=False, markup=False)
    if result.trials:
        console.print(_trial_table(result))
    outcomes = [outcome for run in result.runs for outcome in run.measured]
    if not outcomes:
        return
    rate = result.runs[0].requests_per_second
    words = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(outcomes).items())
    console.print(f"\nat {rate:.4g} requests/s: {words}", highlight=False, markup=False)
    confidence = result.config.search.confidence
    table = _group_table()
    _add_group(table, "all", group_of("all", outcomes, confidence), "")
    for dimension in divide(outcomes, confidence):
        for place, group in enumerate(dimension.groups):
            jain = f"{dimension.jain:.3f}, {dimension.jain_tokens:.3f}" if place == 0 else ""
            _add_group(table, dimension.name if place == 0 else "", group, jain)
    console.print(table)


def _trial_table(result: SloResult) -> Table:
    table = Table(box=None)
    for name in ("requests/s", "runs", "measured", "in time", "share", "interval"):
        table.add_column(name, justify="right")
    for trial in sorted(result.trials, key=lambda trial: trial.requests_per_second):
        low, high = trial.interval
        counts = (len(trial.counts), trial.sent, trial.met)
        share = (f"{trial.share:.1%}", f"{low:.1%} to {high:.1%}")
        table.add_row(f"{trial.requests_per_second:.4g}", *map(str, counts), *share)
    return table


def _group_table() -> Table:
    table = Table(box=None)
    table.add_column("by")
    table.add_column("")
    for name in ("requests", "in time", "TTFT p50", "p99", "TPOT p50", "p99, ms", "Jain: in time, tokens"):
        table.add_column(name, justify="right")
    return table


def _add_group(table: Table, dimension: str, group: Group, jain: str) -> None:
    share = f"{group.share:.1%}"
    table.add_row(dimension, group.name, str(group.sent), share, *_times(group.ttft_ms), *_times(group.tpot_ms), jain)


def _times(times: Sequence[float]) -> Sequence[str]:
    return [f"{value:.1f}" for value in np.percentile(times, [50, 99])] if times else ["", ""]
