from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from segue.bench.report import Report
from segue.cli.main import build_app


def coldstart(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ("bench", "coldstart", *arguments), env={"COLUMNS": "200"})


def test_the_points_that_were_asked_for_are_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--prompts", "6", "--ranks", "4", "--adapters", "1,2", "--tiers", "disk", "--links", "full,0.2")
    result = coldstart(*options, "--samples", "0", "--decodes", "1", "--runs", "1", "--json", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    report = Report.read(out)
    points = {(row.adapters, row.link_bytes_per_second, row.decodes) for row in report.rows}
    assert points == {(count, link, decodes) for count in (1, 2) for link in (None, 0.2e9) for decodes in (0, 1)}
    assert (report.settings["points"], report.settings["seed"]) == (8, 0)
    assert len(result.stdout.splitlines()) >= 9


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--preset", "none"), "--preset: must be one of table-8b, corners, is 'none'"),
        (
            ("--preset", "corners", "--ranks", "8"),
            "--preset names all points: leave out --prompts, --ranks, --targets, --adapters, --tiers, --links",
        ),
        (
            ("--preset", "table-8b", "--decodes", "4"),
            "--preset table-8b names all points: leave out --samples and --decodes",
        ),
        (("--links", "fast"), "--links: must be numbers of GB/s or full, with commas between them, is 'fast'"),
        (("--links", "0"), "link: must be greater than 0, is 0.0"),
        (("--tiers", "gpu"), "--tiers: must be of host, disk, is 'gpu'"),
        (("--targets", "mlp"), "--targets: must be of qkvo, all, is 'mlp'"),
        (("--ranks", "a"), "--ranks: must be whole numbers with commas between them, is 'a'"),
        (("--samples", "5"), "samples: must be at most 0, the points that are no corners, is 5"),
        (("--shape", "tiny", "--model", "m"), "give --shape or --model, not both"),
        (("--runs", "0"), "runs: must be greater than 0, is 0"),
        (("--json", "nowhere/report.json"), "nowhere is not a folder"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options: tuple[str, ...], problem: str) -> None:
    result = coldstart(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("segue: ")
    assert result.stderr.endswith(f"{problem}\n")
    assert result.stderr.count("\n") == 1
