from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from segue.bench.report import Report
from segue.bench.scheduler import SchedulerBenchConfig, run_scheduler_bench
from segue.cli.main import build_app
from segue.config import ConfigError


def test_every_case_is_timed() -> None:
    report = run_scheduler_bench(SchedulerBenchConfig(running=24, waiting=40, tenants=(1, 3), steps=5))
    cases = [row.case for row in report.rows]
    assert len(set(cases)) == len(cases) == 2 * 2 * 3
    assert "slo, 3 tenants, 16 places" in cases
    assert all(row.median > 0 and row.runs == 5 for row in report.rows)


def test_the_command_writes_its_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = ["--running", "16", "--waiting", "20", "--tenants", "2", "--steps", "3", "--json", str(path)]
    found = CliRunner().invoke(build_app(), ["bench", "scheduler", *options])
    assert found.exit_code == 0, found.output
    assert "fcfs, 2 tenants, 0 places" in found.output
    assert len(Report.read(path).rows) == 6


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="waiting"):
        SchedulerBenchConfig(waiting=0)
