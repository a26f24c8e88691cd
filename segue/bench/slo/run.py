"""Measures a server: one rate, or the search for the highest that meets the targets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from segue.bench.server_state import wait_until_idle
from segue.bench.slo.arrivals import Phases
from segue.bench.slo.churn import ChurnCount, Churner
from segue.bench.slo.config import SloBenchConfig
from segue.bench.slo.load import LoadProcesses
from segue.bench.slo.load_client import ClientRecord
from segue.bench.slo.outcome import Run, judge_run
from segue.bench.slo.search import NOTHING_SENT, Count, SearchError, SearchResult, Trial, find_rate
from segue.bench.slo.target import Target
from segue.bench.slo.trace import NO_TRACE, Trace
from segue.bench.slo.workload import Adapter, PlannedRequest, plan_requests, rank_adapters

# A void run may have met a moment in which the machine did something else.
_ATTEMPTS = 2
_STOP_LAG_SECONDS = 0.1
# No round of a rate that is measured has this number.
_SETTLING = 1 << 16


class Watcher(Protocol):
    """Whom a benchmark tells what it does. ``record`` is called once for each request as it ends."""

    def begin(self, requests_per_second: float, requests: Sequence[PlannedRequest]) -> None: ...

    def started(self, begin_seconds: float) -> None: ...

    def record(self, record: ClientRecord) -> None: ...

    def end(self, run: Run, void: str | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SloResult:
    """What was measured. ``runs`` are those of the rate that is reported: the best one's, the lowest one's if none
    attained the wanted share, or those of a void one. ``void`` says why nothing of it counts, None if it does.
    ``trials`` are without void runs; ``best`` and ``above`` are as in SearchResult, None without a search.
    """

    config: SloBenchConfig
    target: Target
    adapters: Sequence[Adapter]
    trials: Sequence[Trial]
    best: Trial | None
    above: Trial | None
    is_complete: bool
    runs: Sequence[Run]
    churned: ChurnCount
    void: str | None


class VoidRunError(Exception):
    """The clients did not keep to their schedule, so the run says nothing. The message is one line."""


def run_slo_bench(config: SloBenchConfig, target: Target, watcher: Watcher, trace: Trace = NO_TRACE) -> SloResult:
    """Measure. Raises ConfigError for a workload that the server cannot have, SearchError, and BenchmarkError."""
    adapters = rank_adapters(config.workload, target.adapters)
    bench = _SloBench(config, target, adapters, trace, watcher)
    void: str | None = None
    found: SearchResult | None = None
    try:
        bench.settle()
        if config.rate is None:
            found = find_rate(config.search, bench.measure, time.monotonic, bench.trials)
        else:
            trial = Trial(requests_per_second=config.rate, confidence=config.search.confidence)
            count = bench.measure(config.rate, 0)
            if count.sent == 0:
                raise SearchError(NOTHING_SENT)
            trial.counts.append(count)
            bench.trials.append(trial)
    except VoidRunError as error:
        void = str(error)
    best = None if found is None else found.best
    return SloResult(
        config=config,
        target=target,
        adapters=adapters,
        trials=[trial for trial in bench.trials if trial.counts],
        best=best,
        above=None if found is None else found.above,
        is_complete=found is not None and found.is_complete,
        runs=bench.runs_to_show(best, void is not None),
        churned=bench.churned,
        void=void,
    )


class _SloBench:
    """Runs single rates."""

    def __init__(
        self, config: SloBenchConfig, target: Target, adapters: Sequence[Adapter], trace: Trace, watcher: Watcher
    ) -> None:
        self._config = config
        self._target = target
        self._adapters = adapters
        self._trace = trace
        self._watcher = watcher
        self._runs: list[Run] = []
        self._void: Run | None = None
        self.trials: list[Trial] = []
        self.churned = ChurnCount()

    def settle(self) -> None:
        """Load that is not kept."""
        if self._config.settle_seconds > 0:
            self._run(self._config.first_rate, self._config.settling, _SETTLING)

    def measure(self, requests_per_second: float, round_number: int) -> Count:
        """One run. Raises VoidRunError if the clients lag in each attempt, and BenchmarkError."""
        for attempt in range(_ATTEMPTS):
            run = self._run(requests_per_second, self._config.phases, round_number * _ATTEMPTS + attempt)
            problem = run.lag.problem(self._config.client.most_lag_ms)
            self._watcher.end(run, problem)
            if problem is None:
                self._runs.append(run)
                return Count(sent=len(run.measured), met=sum(outcome.met for outcome in run.measured))
        self._void = run
        raise VoidRunError(
            f"at {requests_per_second:.4g} requests/s {problem}; give it more --clients or a machine of its own"
        )

    def runs_to_show(self, best: Trial | None, is_void: bool) -> Sequence[Run]:
        if is_void:
            return [] if self._void is None else [self._void]
        rates = [trial.requests_per_second for trial in self.trials]
        rate = min(rates) if best is None else best.requests_per_second
        return [run for run in self._runs if run.requests_per_second == rate]

    def _run(self, requests_per_second: float, phases: Phases, round_number: int) -> Run:
        requests = plan_requests(
            self._config.workload,
            self._adapters,
            requests_per_second,
            phases,
            round_number=round_number,
            context_tokens=self._target.context_tokens,
            trace=self._trace,
        )
        self._watcher.begin(requests_per_second, requests)
        wait_until_idle(self._target.address)
        client = self._config.client
        with (
            LoadProcesses(self._target.address, self._target.vocab_size, requests, client) as load,
            Churner(self._target.address, self._config.churn, self._adapters, self._config.workload.seed) as churner,
        ):

            def begun(begin_seconds: float) -> None:
                self._watcher.started(begin_seconds)
                churner.start(begin_seconds, phases.total_seconds)

            seconds = stop_seconds(requests, phases, client.timeout_seconds)
            result = load.run(seconds, self._watcher.record, begun)
        self.churned = self.churned.plus(churner.count)
        return judge_run(requests_per_second, requests, result)


def stop_seconds(requests: Sequence[PlannedRequest], phases: Phases, timeout_seconds: float) -> float:
    """When whatever still runs is cut off, in seconds from the run's beginning: each measured request that has not
    ended by then has missed its targets."""
    last = phases.total_seconds
    for request in requests:
        if request.measured:
            late = min(request.slo.late_after_seconds(request.output_tokens), timeout_seconds)
            last = max(last, request.at_seconds + late)
    return last + _STOP_LAG_SECONDS
