"""What is written of a result: rows, requests and a page that needs nothing else."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from segue.bench.report import Report
from segue.bench.slo.churn import ChurnCount
from segue.bench.slo.config import SloBenchConfig, SloClass, WorkloadConfig
from segue.bench.slo.csv_file import COLUMNS, write_csv
from segue.bench.slo.html_page import html_page
from segue.bench.slo.outcome import Lag, Run
from segue.bench.slo.rows import slo_report
from segue.bench.slo.run import SloResult
from segue.bench.slo.search import Count, Trial
from segue.bench.slo.svg import Plot, Series, draw_bars, draw_plot
from segue.bench.slo.table import headline
from segue.bench.slo.target import Target
from segue.bench.slo.workload import Adapter
from segue.bench.tables import readme_tables
from tests.bench.slo.plans import outcome

ADAPTERS = (Adapter(name="s", rank=8, decile=1), Adapter(name='<l & "x">', rank=64, decile=6))


def trial(rate: float, sent: int, met: int) -> Trial:
    return Trial(requests_per_second=rate, confidence=0.95, counts=[Count(sent=sent, met=met)])


def result(**values: object) -> SloResult:
    outcomes = [
        outcome(0, request={"measured": False}, ttft_ms=999),
        *(outcome(number, request={"adapter": ADAPTERS[number % 2]}) for number in range(1, 20)),
        outcome(20, request={"adapter": ADAPTERS[0]}, ttft_ms=300),
    ]
    run = Run(requests_per_second=8.0, outcomes=outcomes, lag=Lag(send_p99_ms=0.5, loop_p99_ms=0.25))
    trials = (trial(8, 20, 19), trial(16, 40, 20))
    target = Target(
        address="here:1", model="tiny", device="cpu", dtype="float32", vocab_size=9, context_tokens=99, adapters=()
    )
    defaults: dict[str, object] = {
        "config": SloBenchConfig(workload=WorkloadConfig(classes=(SloClass(ttft_ms=100, tpot_ms=20),))),
        "target": target,
        "adapters": ADAPTERS,
        "trials": trials,
        "best": trials[0],
        "above": trials[1],
        "is_complete": True,
        "runs": [run],
        "churned": ChurnCount(),
        "void": None,
    }
    return SloResult(**(defaults | values))  # type: ignore[arg-type]


def test_rows_have_the_answer_the_trials_and_the_groups(tmp_path: Path) -> None:
    slo_report(result()).write(tmp_path / "report.json")
    report = Report.read(tmp_path / "report.json")
    found = {(row.measure, row.part, row.group, row.requests_per_second): row for row in report.rows}
    assert found["goodput_requests_per_second", None, None, None].median == 8
    attained = found["slo_attainment_fraction", "trial", None, 16.0]
    assert (attained.batch, attained.median) == (40, 0.5)
    assert (attained.low, attained.high) == pytest.approx((0.3520, 0.6480), abs=1e-4)
    total = found["slo_attainment_fraction", "all", "all", 8.0]
    assert (total.batch, total.median) == (20, 0.95)
    assert found["ttft_ms", "all", "all", 8.0].p99 == pytest.approx(252.5)
    assert found["slo_attainment_fraction", "rank", "rank 64", 8.0].median == 1.0
    assert found["jain_index", "rank", None, 8.0].median < 1
    assert found["requests_count", None, "late first token", 8.0].median == 1
    assert found["send_lag_p99_ms", None, None, 8.0].median == 0.5
    assert report.settings["missed_at_requests_per_second"] == 16
    assert report.settings["server"]["model"] == "tiny"
    assert {(row.adapters, row.ranks) for row in report.rows} == {(2, (8, 64))}


def test_a_void_result_has_no_goodput() -> None:
    report = slo_report(result(void="the clients lag"))
    assert "goodput_requests_per_second" not in {row.measure for row in report.rows}
    assert report.settings["void"] == "the clients lag"
    assert headline(result(void="x"))[0] == "no result: the run is void"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "8 requests/s with 95% of the requests in time; 16 has not"),
        ({"above": None}, "at least 8 requests/s with 95% of the requests in time"),
        (
            {"best": None},
            "no rate from 8 requests/s on has 95% of the requests in time; a longer --duration tells of lower ones",
        ),
        (
            {"config": SloBenchConfig(rate=8.0)},
            "95.0% of the requests in time (76.4% to 99.1%) at 8 requests/s",
        ),
    ],
)
def test_the_answer_is_a_line(values: dict[str, object], line: str) -> None:
    assert headline(result(**values))[0] == line


def test_what_is_not_sure_or_not_done_is_said() -> None:
    lines = headline(result(is_complete=False, churned=ChurnCount(done=3, failed=1, last_error="pinned")))
    assert "not sure: 95.0% were in time there, which may be 76.4% to 99.1%" in lines
    assert "time was over before the search was as near as wanted" in lines
    assert "3 adapters were taken from the server, 1 calls for it failed: pinned" in lines


def test_every_request_is_a_line_of_csv(tmp_path: Path) -> None:
    write_csv(result(), tmp_path / "requests.csv")
    with (tmp_path / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 21
    assert (rows[0]["measured"], rows[1]["measured"]) == ("0", "1")
    assert (rows[1]["adapter"], rows[1]["rank"], rows[1]["ttft_ms"], rows[1]["tpot_ms"]) == (
        '<l & "x">',
        "64",
        "50.000",
        "10.000",
    )
    assert [row["verdict"] for row in rows].count("met") == 19


class FindsLinks(HTMLParser):
    """Notes what a page would load, and that its elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag in ("script", "link", "iframe", "img"):
            self.links.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone() -> None:
    value = result(void="<b>late</b>")
    page = html_page(value, slo_report(value))
    parser = FindsLinks()
    parser.feed(page)
    assert (parser.links, parser.open) == ([], [])
    assert "url(" not in page
    assert "&lt;b&gt;late&lt;/b&gt;" in page
    assert page.count("<svg") >= 6
    for words in ("By rank", "By popularity", "By warmth", "rank 64", "Jain"):
        assert words in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_a_result_without_requests_still_is_a_page() -> None:
    value = result(runs=[], trials=[], best=None, void="late")
    assert "Nothing was measured." in html_page(value, slo_report(value))


def test_points_lie_where_their_values_are() -> None:
    series = Series(name="s", points=[(0.0, 0.0), (10.0, 1.0)], ranges=[(0.0, 0.5), (0.5, 1.0)])
    root = ElementTree.fromstring(draw_plot(Plot(x_label="x", y_label="y", series=[series], y_most=1.0)))
    (line,) = [element for element in root.iter() if element.tag.endswith("polyline")]
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert (x1, y1) == (64, 256)
    assert (x2, y2) == (624, 16)


def test_bars_are_as_long_as_their_shares() -> None:
    root = ElementTree.fromstring(draw_bars(["a", "b"], [0.5, 1.0], [(0.4, 0.6), (0.9, 1.0)]))
    widths = [float(element.attrib["width"]) for element in root.iter() if element.tag.endswith("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_reports_become_a_table_of_the_readme() -> None:
    lines = readme_tables({"h.json": slo_report(result()), "v.json": slo_report(result(void="late"))}).splitlines()
    assert lines[:4] == [
        "| under load | `h.json` | `v.json` |",
        "| --- | ---: | ---: |",
        "| requests/s with 95% in time | 8 |  |",
        "| measured at, requests/s | 8 |  |",
    ]
    assert "| in time (Wilson's interval) | 95.0% (76.4% to 99.1%) |  |" in lines
    assert "| first token, ms: median, p99 | 50.0, 252.5 |  |" in lines
    assert "| void |  | late |" in lines
