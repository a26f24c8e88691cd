"""A report as one page that needs nothing else: a map of who is fastest where, and plots, drawn as inline SVG."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from segue.bench.coldstart.charts import bars, forest, legend, lines_chart
from segue.bench.coldstart.map import region_words, winner_map
from segue.bench.coldstart.points import Mode
from segue.bench.coldstart.view import (
    LONGEST_STEP,
    OVER_BEST,
    OVER_WARM,
    STEP_OVER_BOUND,
    TTFT,
    USUAL_STEP,
    PointView,
    point_views,
)
from segue.bench.report import Report

COLOURS: Mapping[Mode, str] = MappingProxyType(
    {
        Mode.WARM: "#7f7f7f",
        Mode.LOAD_FIRST: "#d95f02",
        Mode.STREAM: "#1b78b4",
        Mode.CPU: "#7b4ea3",
        Mode.PLANNER: "#1b9e4b",
    }
)
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 12px; }
td, th { padding: 2px 8px; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
svg { display: block; margin: 0.5em 0; max-width: 100%; }
svg text { font: 11px system-ui, sans-serif; fill: #222; }
.note { color: #555; }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the page so that readers see it whole or not at all. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(page(report), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def page(report: Report) -> str:
    """The page's HTML."""
    views = point_views(report)
    idle = [view for view in views if view.point.decodes == 0]
    measured = [view for view in views if not view.predicted]
    parts = [
        f"<h1>Cold starts: {html.escape(report.machine.gpu or report.machine.cpu or 'unknown machine')}</h1>",
        f"<p class='note'>{html.escape(_origin(report))}</p>",
        legend(COLOURS),
        "<h2>Who is fastest where</h2>",
        "<p>Each cell is a point: the cold mode with the least median time to the first token of the requests that "
        "arrive, and that time over warm. Full colour was measured, pale colour with a dashed border is what the cost "
        "model predicts. Hover for all modes.</p>",
        winner_map(idle, COLOURS),
        *[f"<p>{html.escape(text)}</p>" for text in region_words(idle)],
        *_planner_parts(measured),
        *_prompt_parts(idle),
        *_step_parts(measured),
        "<h2>All points that were measured</h2>",
        _table(measured),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>segue bench coldstart</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _origin(report: Report) -> str:
    settings = report.settings
    parts = [
        str(settings.get("shape") or settings.get("model_dir")),
        str(settings.get("dtype")),
        f"{settings.get('cpu_workers')} CPU workers",
        f"{settings.get('runs')} rounds at each point",
        f"commit {report.short_commit}",
    ]
    if settings.get("left_out_points"):
        parts.append(f"no time for {settings['left_out_points']} of {settings['points']} points")
    if settings.get("failed_points"):
        parts.append(f"{len(settings['failed_points'])} points could not be measured")
    for mode, error in (settings.get("prediction_relative_errors") or {}).items():
        parts.append(f"predictions of {mode} are off by {error:.0%} in the median")
    return ", ".join(parts)


def _planner_parts(measured: Sequence[PointView]) -> list[str]:
    rows = [
        (str(view.point), row.median, row.lower_bound or row.median, row.upper_bound or row.median)
        for view in measured
        if (row := view.rows.get((OVER_BEST, Mode.PLANNER))) is not None
    ]
    if not rows:
        return []
    above = sum(lower > 1.05 for _, _, lower, _ in rows)
    return [
        "<h2>The planner over the best of the other cold modes</h2>",
        f"<p>Time to the first token: ratio of medians and its one-sided bounds of 95%. The lower bound is above 1.05 "
        f"at {above} of {len(rows)} points.</p>",
        forest(sorted(rows, key=lambda row: row[1]), reference=1.05, colour=COLOURS[Mode.PLANNER]),
    ]


def _prompt_parts(idle: Sequence[PointView]) -> list[str]:
    """Time to the first token by prompt, where at least two prompts share all else."""
    groups: dict[tuple[object, ...], list[PointView]] = {}
    for view in idle:
        point = view.point
        key: tuple[object, ...] = (point.adapters, point.rank, point.targets.value, point.tier.value, point.link_words)
        groups.setdefault(key, []).append(view)
    found = {key: group for key, group in groups.items() if len({view.point.prompt for view in group}) > 1}
    parts = []
    for key, group in sorted(found.items(), key=lambda item: str(item[0])):
        series: dict[Mode, list[tuple[int, float, bool]]] = {
            mode: sorted(
                (view.point.prompt, value, view.predicted)
                for view in group
                if (value := view.median(TTFT, mode)) is not None
            )
            for mode in Mode
        }
        adapters, rank, targets, tier, link = key
        title = f"{adapters} x rank {rank} on {targets} from {tier}, link {link}"
        parts.append(lines_chart(title, series, COLOURS))
    if not parts:
        return []
    charts = "".join(f"<div>{chart}</div>" for chart in parts)
    return [
        "<h2>Time to the first token by prompt</h2>",
        "<p>Milliseconds, both axes logarithmic; hollow marks are predicted.</p>",
        f"<div style='display:flex;flex-wrap:wrap;gap:10px'>{charts}</div>",
    ]


def _step_parts(measured: Sequence[PointView]) -> list[str]:
    busy = [view for view in measured if view.median(LONGEST_STEP, Mode.PLANNER) is not None]
    if not busy:
        return []
    groups = [
        (
            f"{view.point} (usual {view.median(USUAL_STEP, Mode.PLANNER) or 0.0:.1f} ms)",
            {mode: value for mode in Mode if (value := view.median(LONGEST_STEP, mode)) is not None},
        )
        for view in busy
    ]
    return [
        "<h2>The longest step of the requests that decode meanwhile</h2>",
        "<p>Milliseconds, median over the rounds.</p>",
        bars(groups, COLOURS),
    ]


def _table(measured: Sequence[PointView]) -> str:
    names = [
        "point",
        *(f"{mode}, ms" for mode in Mode),
        "planner over best (95%)",
        "over warm",
        "longest step over bound",
    ]
    rows = []
    for view in measured:
        best = view.rows.get((OVER_BEST, Mode.PLANNER))
        bounds = "" if best is None else f"{best.median:.2f} ({best.lower_bound:.2f} to {best.upper_bound:.2f})"
        values = [view.median(TTFT, mode) for mode in Mode]
        ratios = [view.median(measure, Mode.PLANNER) for measure in (OVER_WARM, STEP_OVER_BOUND)]
        cells = [str(view.point), *map(_number, values), bounds, *map(_number, ratios)]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
