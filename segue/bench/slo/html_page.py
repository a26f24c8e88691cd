"""A result as one HTML page, which needs no network and no other file."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from segue.bench.report import Report
from segue.bench.slo.breakdown import Dimension, Group, count_verdicts, divide, group_of
from segue.bench.slo.outcome import Outcome
from segue.bench.slo.run import SloResult
from segue.bench.slo.svg import Plot, Series, draw_bars, draw_plot
from segue.bench.slo.table import headline

_MOST_CDF_POINTS = 400
_MOST_DOTS = 4000
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1360px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } figure { margin: 0; } figcaption { font-weight: 600; }
table { border-collapse: collapse; } td, th { padding: 0.15em 0.7em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } .void { color: #a00; font-weight: 600; }
pre { background: #f6f6f6; padding: 1em; overflow: auto; font-size: 12px; } svg { max-width: 100%; height: auto; }
"""


def write_html(result: SloResult, report: Report, path: Path) -> None:
    """Write the page. Raises OSError."""
    path.write_text(html_page(result, report), encoding="utf-8")


def html_page(result: SloResult, report: Report) -> str:
    """The page's text."""
    outcomes = [outcome for run in result.runs for outcome in run.measured]
    confidence = result.config.search.confidence
    lines = headline(result)
    parts = [f"<h1>{html.escape(lines[0])}</h1>"]
    if result.void is not None:
        parts.append(f'<p class="void">Void: {html.escape(result.void)}</p>')
    parts += [f"<p>{html.escape(line)}</p>" for line in lines[1:]]
    parts.append(f'<div class="plots">{"".join(_plots(result, outcomes))}</div>')
    if outcomes:
        rate = result.runs[0].requests_per_second
        parts.append(f"<h2>At {rate:.4g} requests/s</h2>")
        words = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(outcomes).items())
        parts.append(f"<p>{len(outcomes)} requests measured: {html.escape(words)}.</p>")
        parts.append(_group_table("all", [group_of("all", outcomes, confidence)]))
        parts += [_dimension(dimension) for dimension in divide(outcomes, confidence)]
    machine = report.machine.gpu or report.machine.cpu or "unknown machine"
    parts.append(
        f"<h2>Settings</h2><p>Clients on {html.escape(machine)}, commit {html.escape(report.short_commit)}.</p>"
    )
    parts.append(f"<pre>{html.escape(json.dumps(report.settings, indent=2, default=str))}</pre>")
    title = html.escape(lines[0])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _plots(result: SloResult, outcomes: Sequence[Outcome]) -> Sequence[str]:
    trials = sorted(result.trials, key=lambda trial: trial.requests_per_second)
    attained = Series(
        name="share",
        points=[(trial.requests_per_second, trial.share) for trial in trials],
        ranges=[trial.interval for trial in trials],
    )
    targets = result.config.workload.classes
    ttft_marks = [(f"{each.name}: {each.ttft_ms:g} ms", each.ttft_ms) for each in targets if each.ttft_ms is not None]
    tpot_marks = [(f"{each.name}: {each.tpot_ms:g} ms", each.tpot_ms) for each in targets if each.tpot_ms is not None]
    return [
        _figure(
            "Share of the requests sent that met all targets",
            Plot(
                x_label="requests/s",
                y_label="share",
                series=[attained],
                y_marks=[("wanted", result.config.search.attain)] if result.config.rate is None else [],
                y_most=1.0,
            ),
        ),
        _figure(
            "Time to the first token, from the intended start", _cdf(outcomes, lambda o: o.ttft_seconds, ttft_marks)
        ),
        _figure("Time per token after the first", _cdf(outcomes, lambda o: o.tpot_seconds, tpot_marks)),
        _figure("First tokens over the run", _over_time(outcomes)),
    ]


def _figure(caption: str, plot: Plot) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{draw_plot(plot)}</figure>"


def _cdf(
    outcomes: Sequence[Outcome], seconds: Callable[[Outcome], float | None], marks: Sequence[tuple[str, float]]
) -> Plot:
    """For each class the share of all its requests that had that time at most: what never came is no part of it."""
    members: dict[str, list[float | None]] = {}
    for outcome in outcomes:
        members.setdefault(outcome.request.slo.name, []).append(seconds(outcome))
    series = []
    for name, values in members.items():
        times = sorted(1e3 * value for value in values if value is not None)
        places = np.unique(np.linspace(0, len(times) - 1, min(len(times), _MOST_CDF_POINTS)).astype(int)).tolist()
        points = [(max(times[place], 0.01), (place + 1) / len(values)) for place in places]
        series.append(Series(name=name, points=points))
    return Plot(x_label="ms", y_label="share of all", series=series, x_marks=marks, y_most=1.0, x_log=True)


def _over_time(outcomes: Sequence[Outcome]) -> Plot:
    members: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes[:: 1 + len(outcomes) // _MOST_DOTS]:
        if outcome.ttft_seconds is not None:
            tier = outcome.record.tier or "unfinished"
            name = "base model" if tier == "none" else tier
            members.setdefault(name, []).append((outcome.request.at_seconds, 1e3 * outcome.ttft_seconds))
    series = [Series(name=name, points=points, is_line=False) for name, points in sorted(members.items())]
    return Plot(x_label="intended start, s", y_label="ms to the first token", series=series)


def _dimension(dimension: Dimension) -> str:
    groups = dimension.groups
    intervals = [(group.low, group.high) for group in groups]
    bars = draw_bars([group.name for group in groups], [group.share for group in groups], intervals)
    fairness = (
        f"Jain's index: {dimension.jain:.3f} of the shares in time, "
        f"{dimension.jain_tokens:.3f} of the tokens received over those wanted."
    )
    return f"<h2>By {dimension.name}</h2>{bars}{_group_table(dimension.name, groups)}<p>{fairness}</p>"


def _group_table(name: str, groups: Sequence[Group]) -> str:
    titles = (name, "requests", "in time", "interval", "TTFT p50", "p99", "TPOT p50", "p99, ms")
    rows = ["".join(f"<th>{html.escape(title)}</th>" for title in titles)]
    for group in groups:
        shares = (f"{group.share:.1%}", f"{group.low:.1%} to {group.high:.1%}")
        cells = (group.name, str(group.sent), *shares, *_times(group.ttft_ms), *_times(group.tpot_ms))
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _times(times: Sequence[float]) -> Sequence[str]:
    return [f"{value:.1f}" for value in np.percentile(times, [50, 99])] if times else ["", ""]
