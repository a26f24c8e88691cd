"""What a load took at both servers: rows of a report, and the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from segue.bench.coldstart.load_config import LoadConfig
from segue.bench.coldstart.statistics import BoundedRatio, ratio_of_means
from segue.bench.report import Percentiles, Report, Row
from segue.types import Tier, Timing


class Server(StrEnum):
    """The two that are compared."""

    WARM = "warm"
    COLD = "cold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A request's times in seconds."""

    ttft: float
    tpot: float | None
    time_per_token: float
    end_to_end: float

    @classmethod
    def of(cls, timing: Timing, tokens: int) -> Served:
        return cls(
            ttft=timing.ttft_seconds,
            tpot=timing.tpot_seconds,
            time_per_token=timing.total_seconds / tokens,
            end_to_end=timing.total_seconds,
        )


_MEASURES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "time_per_token": "time_per_token_ms", "end_to_end": "end_to_end_ms"}


def report_rows(config: LoadConfig, served: Mapping[Server, Sequence[Served]]) -> list[Row]:
    """Of each kind of time: both servers' rows, and the cold server's mean over the warm one's."""
    rows = []
    for name, measure in _MEASURES.items():
        # Answers of one token have no time after the first; both servers' answers are as long.
        times = {
            server: [1e3 * value for value in (getattr(item, name) for item in items) if value is not None]
            for server, items in served.items()
        }
        rows += [_timed_row(config, measure, server, times[server]) for server in Server]
        ratio = ratio_of_means(times[Server.COLD], times[Server.WARM], config.seed)
        rows.append(_ratio_row(config, measure.removesuffix("_ms"), ratio, len(times[Server.COLD])))
    return rows


def _timed_row(config: LoadConfig, measure: str, server: Server, times: Sequence[float]) -> Row:
    return _row(
        config,
        measure,
        server,
        mean=float(np.mean(times)),
        p99=float(np.percentile(times, 99)),
        **dataclasses.asdict(Percentiles.of(times)),
    )


def _ratio_row(config: LoadConfig, name: str, ratio: BoundedRatio, runs: int) -> Row:
    return _row(
        config,
        f"{name}_cold_over_warm_ratio",
        Server.COLD,
        median=ratio.value,
        p10=ratio.p10,
        p90=ratio.p90,
        lower_bound=ratio.lower,
        upper_bound=ratio.upper,
        runs=runs,
    )


def _row(config: LoadConfig, measure: str, server: Server, **values: object) -> Row:
    return Row(
        measure=measure,
        batch=config.requests,
        adapters=config.contents,
        ranks=(config.rank,),
        targets=config.targets.value,
        residency=(Tier.DEVICE if server is Server.WARM else Tier.HOST).value,
        mode=server.value,
        **values,  # type: ignore[arg-type]
    )


def column_names() -> Sequence[str]:
    """The columns of a line."""
    return ["milliseconds", *(f"{server}, mean" for server in Server), "cold over warm (95%)", "p99 warm", "p99 cold"]


def lines(report: Report) -> Sequence[Sequence[str]]:
    """A line for each kind of time."""
    rows = {(row.measure, row.mode): row for row in report.rows}
    found = []
    for measure in _MEASURES.values():
        warm, cold = (rows[measure, server.value] for server in Server)
        name = measure.removesuffix("_ms")
        ratio = rows[f"{name}_cold_over_warm_ratio", Server.COLD.value]
        bounds = f"{ratio.median:.3f} ({ratio.lower_bound:.3f} to {ratio.upper_bound:.3f})"
        times = [f"{value or 0.0:.2f}" for value in (warm.mean, cold.mean, warm.p99, cold.p99)]
        found.append([name.replace("_", " "), *times[:2], bounds, *times[2:]])
    return found
