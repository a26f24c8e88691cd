"""What a benchmark is doing, on a terminal while it does it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from segue.bench.slo.config import SloBenchConfig
from segue.bench.slo.load_client import OK, ClientRecord
from segue.bench.slo.outcome import Outcome, Run, Verdict, judge
from segue.bench.slo.statistics import wilson_interval
from segue.bench.slo.workload import PlannedRequest

_COLUMNS = ("requests/s", "measured", "in time", "interval", "TTFT p50, p99 ms", "TPOT p50, p99 ms", "send lag")
_BAR_CELLS = 40
_RECENT = 200


@dataclass(slots=True, kw_only=True)
class _Current:
    """The run under way."""

    requests_per_second: float
    requests: Sequence[PlannedRequest]
    begin_seconds: float | None = None
    outcomes: list[Outcome] = field(default_factory=list)


class LiveView:
    """A table of the rates that were measured, and the run under way. Use as a context."""

    def __init__(self, console: Console, config: SloBenchConfig) -> None:
        self._config = config
        self._past = Table(box=None)
        for name in _COLUMNS:
            self._past.add_column(name, justify="right")
        self._current: _Current | None = None
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, requests_per_second: float, requests: Sequence[PlannedRequest]) -> None:
        """A run is prepared."""
        self._current = _Current(requests_per_second=requests_per_second, requests=requests)

    def started(self, begin_seconds: float) -> None:
        """Its first moment, of CLOCK_MONOTONIC."""
        if self._current is not None:
            self._current.begin_seconds = begin_seconds

    def record(self, record: ClientRecord) -> None:
        """A request has ended."""
        current = self._current
        if current is not None and current.begin_seconds is not None:
            current.outcomes.append(judge(current.requests[record.number], record, current.begin_seconds))

    def end(self, run: Run, void: str | None) -> None:
        """The run is over."""
        self._current = None
        measured = run.measured
        share, interval = "none measured" if void is None else "void", ""
        if void is None and measured:
            met = sum(outcome.met for outcome in measured)
            low, high = wilson_interval(met, len(measured), self._config.search.confidence)
            share, interval = f"{met / len(measured):.1%}", f"{low:.1%} to {high:.1%}"
        lag = f"{run.lag.send_p99_ms:.1f} ms"
        rate = f"{run.requests_per_second:.4g}"
        cells = (rate, str(len(measured)), share, interval, *_times(measured), lag)
        self._past.add_row(*cells)
        if not self._live.console.is_terminal:
            # Nothing is drawn there; whoever reads a log sees how far it is.
            words = "; ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, cells, strict=True) if cell)
            self._live.console.print(words, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """What is shown now. Called by a thread of its own, so it looks once at what may be replaced."""
        current = self._current
        parts: list[RenderableType] = [self._past] if self._past.rows else []
        if current is not None:
            parts += _describe(current, self._config)
        return Group(*parts)


def _describe(current: _Current, config: SloBenchConfig) -> Sequence[RenderableType]:
    rate = f"{current.requests_per_second:.4g} requests/s"
    if current.begin_seconds is None:
        return [Text(f"{rate}: the clients prepare {len(current.requests)} requests")]
    passed = time.monotonic() - current.begin_seconds
    due = sum(request.at_seconds <= passed for request in current.requests)
    outcomes = list(current.outcomes)
    counts = {verdict: sum(outcome.verdict is verdict for outcome in outcomes) for verdict in Verdict}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    ttft, tpot = _times([outcome for outcome in outcomes[-_RECENT:] if outcome.record.code == OK])
    return [
        Text(f"{rate}: {_phase(config, passed)}; {due} sent, {due - len(outcomes)} under way, {words or 'none ended'}"),
        Text(f"latest: TTFT p50, p99 {ttft or '-'} ms; TPOT {tpot or '-'} ms"),
        ProgressBar(total=config.phases.total_seconds, completed=max(passed, 0.0), width=_BAR_CELLS),
    ]


def _phase(config: SloBenchConfig, passed_seconds: float) -> str:
    phases = config.phases
    if passed_seconds < phases.warmup_seconds:
        return "warming up"
    if phases.measures(passed_seconds):
        return "measuring"
    return "cooling down" if passed_seconds < phases.total_seconds else "waiting for the last"


def _times(outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """Median and 99th percentile of both times, in ms; empty without any."""
    ttft = [outcome.ttft_seconds for outcome in outcomes if outcome.ttft_seconds is not None]
    tpot = [outcome.tpot_seconds for outcome in outcomes if outcome.tpot_seconds is not None]
    return _percentiles(ttft), _percentiles(tpot)


def _percentiles(seconds: Sequence[float]) -> str:
    return ", ".join(f"{1e3 * value:.1f}" for value in np.percentile(seconds, [50, 99])) if seconds else ""
