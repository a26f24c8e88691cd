"""What is seen while a benchmark runs."""

from __future__ import annotations

import io
import time

from rich.console import Console

from segue.bench.slo.config import SloBenchConfig
from segue.bench.slo.live import LiveView
from segue.bench.slo.outcome import Lag, Run
from tests.bench.slo.plans import BEGIN, answered, outcome, planned

RUN = Run(
    requests_per_second=8.0,
    outcomes=[outcome(number, ttft_ms=50 if number else 500) for number in range(10)],
    lag=Lag(send_p99_ms=0.5, loop_p99_ms=0.25),
)


def rendered(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(view.render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_state_of_a_run_is_shown() -> None:
    view = LiveView(Console(file=io.StringIO(), force_terminal=True), SloBenchConfig())
    assert rendered(view).strip() == ""
    requests = [planned(number, 1000.0 * number) for number in range(5)]
    view.begin(8.0, requests)
    assert "8 requests/s: the clients prepare 5 requests" in rendered(view)
    # It began an hour ago by the clock that the view reads.
    view.started(time.monotonic() - 3500.0)
    late = answered(requests[0])
    late.first_seconds = late.last_seconds = time.monotonic()
    view.record(late)
    shown = rendered(view)
    assert "8 requests/s: waiting for the last; 4 sent, 3 under way, 1 late first token" in shown
    view.end(RUN, None)
    shown = rendered(view)
    assert "90.0%" in shown
    assert "under way" not in shown


def test_a_log_gets_a_line_for_each_run() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out), SloBenchConfig()) as view:
        view.begin(8.0, [planned(0)])
        view.started(BEGIN)
        view.end(RUN, None)
        view.end(RUN, "the clients lag")
    first, second = out.getvalue().splitlines()
    assert first.startswith(
        "requests/s 8; measured 10; in time 90.0%; interval 59.6% to 98.2%; TTFT p50, p99 ms 50.0, "
    )
    assert second.startswith("requests/s 8; measured 10; in time void; TTFT")
