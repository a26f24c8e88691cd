from __future__ import annotations

import dataclasses
import re
import xml.dom.minidom
from pathlib import Path

import pytest
from typer.testing import CliRunner

from segue.bench.coldstart.map import region_words
from segue.bench.coldstart.page import COLOURS, page, write_page
from segue.bench.coldstart.points import Mode, Point
from segue.bench.coldstart.run import point_row, ratio_row
from segue.bench.coldstart.view import OVER_BEST, TTFT, point_views
from segue.bench.machine import Machine
from segue.bench.random_checkpoints import Targets
from segue.bench.report import Report
from segue.bench.tables import readme_tables
from segue.cli.main import build_app
from segue.types import Tier

ONE = Point(prompt=8, rank=4, targets=Targets.QKVO, adapters=1, tier=Tier.HOST)
SLOW = dataclasses.replace(ONE, prompt=32, link_bytes_per_second=6e9)
MS = {Mode.WARM: 2.0, Mode.LOAD_FIRST: 6.0, Mode.STREAM: 5.0, Mode.CPU: 4.0, Mode.PLANNER: 2.5}


def report_of(*points: Point) -> Report:
    rows = []
    for point in points:
        rows += [point_row(point, TTFT, [value] * 3, mode, 0.5) for mode, value in MS.items()]
        rows.append(ratio_row(point, OVER_BEST, [2.5] * 3, [[4.0] * 3], Mode.PLANNER, 0))
    return Report(
        benchmark="coldstart",
        machine=Machine(cpu="a <cpu>", cores=2, gpu=None),
        versions={},
        commit=None,
        settings={"shape": "tiny", "points": 3, "left_out_points": 0, "failed_points": {}},
        rows=tuple(rows),
    )


def predicted(report: Report) -> Report:
    """Its points as if the cost model had said them."""
    rows = [dataclasses.replace(row, predicted=True) for row in report.rows if row.measure == TTFT]
    return dataclasses.replace(report, rows=tuple(rows))


def test_the_map_shows_who_is_fastest_and_what_was_not_measured() -> None:
    guessed = dataclasses.replace(ONE, prompt=128)
    report = report_of(ONE, SLOW)
    text = page(dataclasses.replace(report, rows=(*report.rows, *predicted(report_of(guessed)).rows)))
    cells = re.findall(r"<g><title>(.*?)</title><rect (.*?)/><text .*?>(.*?)</text></g>", text)
    assert len(cells) == 3
    assert all(f"fill='{COLOURS[Mode.PLANNER]}'" in rect and label == "1.25" for _, rect, label in cells)
    assert [title.startswith(str(point)) for (title, _, _), point in zip(cells, (ONE, guessed, SLOW), strict=True)]
    assert ["(predicted)" in title and "stroke-dasharray" in rect for title, rect, _ in cells].count(True) == 1
    assert "planner 2.50 ms" in cells[0][0]


def test_the_page_needs_nothing_else_and_is_well_formed(tmp_path: Path) -> None:
    busy = dataclasses.replace(ONE, decodes=4)
    report = report_of(ONE, dataclasses.replace(ONE, prompt=32), busy)
    steps = [
        point_row(busy, measure, [3.0], mode, None) for measure in ("longest_step_ms", "usual_step_ms") for mode in Mode
    ]
    write_page(dataclasses.replace(report, rows=(*report.rows, *steps)), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "http" not in text
    assert "a &lt;cpu&gt;" in text
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    # The map, the planner against the others, first tokens by prompt, longest steps.
    assert len(svgs) == 4
    for svg in svgs:
        xml.dom.minidom.parseString(svg)
    assert "above 1.05 at 0 of 3 points" in text


def test_where_the_help_pays_is_said_of_what_was_measured() -> None:
    words = region_words(point_views(report_of(ONE, SLOW)))
    assert words == [
        "Without the planner, of the points that were measured: load first is the fastest at 0, stream is the fastest "
        "at 0, cpu is the fastest at 2.",
        f"The planner is 2.00 times as fast as streaming at best, at {ONE}, where the CPU computed 50% of the layers; "
        "it is at least 1.2 times as fast at 2 of 2 points.",
    ]
    assert region_words(point_views(predicted(report_of(ONE))))[0].endswith("cpu is the fastest at 0.")


def test_the_readme_has_a_line_for_each_tier_and_link() -> None:
    report = report_of(ONE, SLOW, dataclasses.replace(ONE, prompt=16))
    lines = readme_tables({"cold.json": report}).splitlines()
    assert lines[2:4] == [
        "| host, 6 GB/s, 0 | 1 | 0 | 0 | 1 | 0.62 | 0 |  | 0.50 |",
        "| host, full, 0 | 2 | 0 | 0 | 2 | 0.62 | 0 |  | 0.50 |",
    ]
    assert lines[0].startswith("| `cold.json`: from, link, decodes | points | load first fastest | stream fastest |")
    assert "cold.json`: a <cpu>" in lines[-1]


def test_a_report_is_drawn_again_without_measuring(tmp_path: Path) -> None:
    report_of(ONE).write(tmp_path / "report.json")
    arguments = ("bench", "coldstart", "--from", str(tmp_path / "report.json"), "--page", str(tmp_path / "page.html"))
    result = CliRunner().invoke(build_app(), arguments, env={"COLUMNS": "200"})
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "page.html").read_text() == page(report_of(ONE))


@pytest.mark.parametrize(
    ("benchmark", "more", "problem"),
    [
        ("engine", (), "is of segue bench engine"),
        ("coldstart", ("--json", "again.json"), "--from measures nothing to write: leave out --json"),
        ("coldstart", ("--page", "nowhere/page.html"), "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path: Path, benchmark: str, more: tuple[str, ...], problem: str) -> None:
    dataclasses.replace(report_of(ONE), benchmark=benchmark).write(tmp_path / "report.json")
    arguments = ("bench", "coldstart", "--from", str(tmp_path / "report.json"), *more)
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 1
    assert result.stderr.endswith(f"{problem}\n")
