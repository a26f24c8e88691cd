"""The bars of an engine's start, as a terminal gets them."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from segue.cli.start_progress import StageBars, shown_progress
from segue.engine.messages import StartProgress


def terminal() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=120, color_system=None), output


def test_each_stage_has_a_bar_and_keeps_its_last_line() -> None:
    console, output = terminal()
    with shown_progress(console) as report:
        for done in (0, 400_000, 16_000_000):
            report(StartProgress("load weights", done, 16_000_000, "bytes"))
        for done in (0, 3):
            report(StartProgress("compile kernels", done, 3, "files"))
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    last = {stage: [line for line in lines if stage in line][-1] for stage in ("load weights", "compile kernels")}
    assert "━ 16.0 MB" in last["load weights"]
    assert "B/s" in last["load weights"]
    assert "━ 3 files" in last["compile kernels"]
    assert "/s" not in last["compile kernels"]


def test_a_bar_ends_where_the_start_does() -> None:
    console, output = terminal()
    with shown_progress(console) as report:
        report(StartProgress("load weights", 1, 2, "bytes"))
        assert isinstance(report, StageBars)
    assert "1 B of 2 B" in output.getvalue()
    assert output.getvalue().endswith("\n\x1b[?25h")


def test_an_engine_that_is_started_again_begins_anew() -> None:
    console, output = terminal()
    bars = StageBars(console)
    for _ in range(2):
        bars(StartProgress("load weights", 0, 2, "bytes"))
        bars(StartProgress("load weights", 2, 2, "bytes"))
    finished = [line for line in output.getvalue().splitlines() if "━ 2 B" in line]
    assert len(finished) >= 2


def test_elsewhere_there_are_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    with shown_progress(Console(file=output)) as report:
        for done in range(4):
            report(StartProgress("load weights", done, 3, "bytes"))
    assert caplog.messages == ["load weights: 0 B of 3 B", "load weights: 3 B"]
    assert output.getvalue() == ""
