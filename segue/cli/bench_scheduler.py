"""``segue bench scheduler``: how long the scheduler takes to decide a step."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from segue.cli.bench_options import JsonOption, numbers
from segue.cli.bench_report import check_outputs, show_console, with_progress, write_outputs
from segue.cli.common import one_line_errors


def scheduler(
    running: Annotated[int, typer.Option(metavar="N", help="Requests that run.")] = 128,
    waiting: Annotated[int, typer.Option(metavar="N", help="Requests that wait.")] = 2000,
    tenants: Annotated[str, typer.Option(metavar="N,...", help="Numbers of tenants.")] = "1,16,256",
    steps: Annotated[int, typer.Option(metavar="N", help="Steps to time for each case.")] = 300,
    json: JsonOption = None,
) -> None:
    """Time how long a step's plan takes, under both policies. Needs no GPU."""
    with one_line_errors():
        from segue.bench.scheduler import SchedulerBenchConfig, run_scheduler_bench

        check_outputs(json, None)
        config = SchedulerBenchConfig(
            running=running, waiting=waiting, tenants=numbers("--tenants", tenants), steps=steps
        )
        report = with_progress(lambda progress: run_scheduler_bench(config, progress))
        write_outputs(report, json, None)
    table = Table(box=None)
    for name in ("case", "median ms", "p10", "p90"):
        table.add_column(name)
    for row in report.rows:
        table.add_row(row.case or "", *(f"{value:.3f}" for value in (row.median, row.p10, row.p90)))
    show_console().print(table)
