"""A simulation's report as tables: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from segue.bench.report import Report, Row

_TIMES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "time_per_token_ms": "time per token"}


def column_names() -> Sequence[str]:
    """The columns of a line."""
    times = [f"{name} {which}, ms" for name in _TIMES.values() for which in ("mean", "p99")]
    return ["placement", "attained", *times, "preemptions", "time per token against most-idle"]


def lines(report: Report) -> Sequence[Sequence[str]]:
    """A line for each placement."""
    by_placement: dict[str, dict[str, Row]] = {}
    for row in report.rows:
        by_placement.setdefault(row.placement or "", {})[row.measure] = row
    idle = by_placement.get("most-idle", {}).get("time_per_token_ms")
    return [_line(name, rows, idle) for name, rows in by_placement.items()]


def placement_table(report: Report) -> Table:
    """The lines for a terminal."""
    table = Table(box=None)
    for place, name in enumerate(column_names()):
        table.add_column(name, justify="right" if place else "left")
    for line in lines(report):
        table.add_row(*line)
    return table


def comparison_table(report: Report) -> Table:
    """By how much a simulation missed the engine's times, those of each of its runs, and these each other."""
    settings = report.settings
    runs = settings["engine_runs"]
    table = Table(box=None)
    for place, name in enumerate(
        (
            "simulated against the engine",
            "off by",
            f"within {settings['tolerance']:.0%}",
            *(f"run {number}" for number in range(1, len(runs) + 1)),
            "runs apart",
        )
    ):
        table.add_column(name, justify="right" if place else "left")
    for name, error in settings["prediction_errors"].items():
        within = abs(error) <= settings["tolerance"]
        of_runs = [settings["simulated_times"][name] / run[name] - 1 for run in runs]
        apart = settings["engine_differences"][name]
        table.add_row(name, *_signed(error), "yes" if within else "no", *_signed(*of_runs, apart))
    table.add_row("the engine's thread had a core", "", "", *(f"{run['cpu_share']:.1%}" for run in runs))
    return table


def _signed(*shares: float) -> Sequence[str]:
    return [f"{share:+.1%}" for share in shares]


def _line(name: str, rows: dict[str, Row], idle: Row | None) -> Sequence[str]:
    cells = [name, f"{_mean(rows['slo_attainment_fraction']):.1%}"]
    for measure in _TIMES:
        row = rows.get(measure)
        cells += ["", ""] if row is None else [f"{_mean(row):.1f}", f"{row.p99 or 0.0:.1f}"]
    cells.append(f"{_mean(rows['preemptions_count']):.0f}")
    ratio = "" if idle is None else f"{_mean(rows['time_per_token_ms']) / _mean(idle) - 1:+.1%}"
    return [*cells, ratio]


def _mean(row: Row) -> float:
    return row.median if row.mean is None else row.mean
