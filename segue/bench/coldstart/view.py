"""A report's rows put together by point, and its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from segue.bench.coldstart.points import COLD_MODES, RIVALS, Mode, Point
from segue.bench.random_checkpoints import Targets
from segue.bench.report import Report, Row
from segue.types import Tier

TTFT = "ttft_ms"
LONGEST_STEP = "longest_step_ms"
USUAL_STEP = "usual_step_ms"
OVER_BEST = "planner_over_best_ratio"
OVER_WARM = "ttft_over_warm_ratio"
STEP_OVER_BOUND = "longest_step_over_bound_ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointView:
    """A point's rows by measure and mode."""

    point: Point
    rows: Mapping[tuple[str, Mode], Row]

    def median(self, measure: str, mode: Mode) -> float | None:
        """None where there is no such row."""
        row = self.rows.get((measure, mode))
        return None if row is None else row.median

    @property
    def predicted(self) -> bool:
        """Whether the cost model says this, and nothing was measured."""
        return any(row.predicted for row in self.rows.values())

    @property
    def gain_over_stream(self) -> float | None:
        """How many times as fast as streaming the planner is; None where one of them was not measured."""
        stream, planner = self.median(TTFT, Mode.STREAM), self.median(TTFT, Mode.PLANNER)
        return None if stream is None or planner is None else stream / planner

    def winner(self, modes: Sequence[Mode] = COLD_MODES) -> Mode | None:
        """The one of these modes with the least time to the first token; None where none has one."""
        times = {mode: self.median(TTFT, mode) for mode in modes}
        found = {mode: value for mode, value in times.items() if value is not None}
        return min(found, key=lambda mode: found[mode], default=None)


def point_views(report: Report) -> tuple[PointView, ...]:
    """In the order of the report."""
    rows: dict[Point, dict[tuple[str, Mode], Row]] = {}
    for row in report.rows:
        if row.mode is not None and row.prompt is not None:
            rows.setdefault(_point_of(row), {})[row.measure, Mode(row.mode)] = row
    return tuple(PointView(point=point, rows=found) for point, found in rows.items())


def column_names() -> Sequence[str]:
    """The columns of a line: the point; milliseconds to the first token in each mode; the planner's over those of the
    best other cold mode and of warm; the longest step of others with it, and over a usual one with a warm prefill."""
    return [
        *("prompt", "rank", "on", "count", "from", "link", "decodes"),
        *Mode,
        "/best (95%)",
        "/warm",
        "step (usual)",
        "/bound",
    ]


def lines(report: Report) -> Sequence[Sequence[str]]:
    """A line for each point that was measured."""
    return [_line(view) for view in point_views(report) if not view.predicted]


def summary_names() -> Sequence[str]:
    """The columns of a summary's line."""
    return [
        "from, link, decodes",
        "points",
        *(f"{mode} fastest" for mode in RIVALS),
        "planner / best of them",
        "bound above 1.05",
        "planner / warm",
        "planner / stream, least",
    ]


def summary_lines(report: Report) -> Sequence[Sequence[str]]:
    """A line for the measured points of each tier, link and number of decodes: where each rival is the fastest of the
    three; the median of the planner's ratios and at how many points their lower bound is above 1.05."""
    groups: dict[tuple[str, str, int], list[PointView]] = {}
    for view in point_views(report):
        if not view.predicted:
            point = view.point
            groups.setdefault((point.tier.value, point.link_words, point.decodes), []).append(view)
    return [_summary_line(*key, views) for key, views in sorted(groups.items())]


def _summary_line(tier: str, link: str, decodes: int, views: Sequence[PointView]) -> Sequence[str]:
    best = [row for view in views if (row := view.rows.get((OVER_BEST, Mode.PLANNER))) is not None]
    warm = [value for view in views if (value := view.median(OVER_WARM, Mode.PLANNER)) is not None]
    stream = [value for view in views if (value := view.gain_over_stream) is not None]
    return [
        f"{tier}, {link}, {decodes}",
        str(len(views)),
        *(str(sum(view.winner(RIVALS) is mode for view in views)) for mode in RIVALS),
        _number(statistics.median(row.median for row in best) if best else None),
        str(sum((row.lower_bound or 0.0) > 1.05 for row in best)),
        _number(statistics.median(warm) if warm else None),
        _number(1 / max(stream) if stream else None),
    ]


def point_table(report: Report) -> Table:
    """The lines for a terminal."""
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(column_names()):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in lines(report):
        table.add_row(*line)
    return table


def _line(view: PointView) -> Sequence[str]:
    best = view.rows.get((OVER_BEST, Mode.PLANNER))
    warm = view.median(OVER_WARM, Mode.PLANNER)
    longest, usual = (view.median(measure, Mode.PLANNER) for measure in (LONGEST_STEP, USUAL_STEP))
    bound = view.median(STEP_OVER_BOUND, Mode.PLANNER)
    return [
        *_coordinates(view.point),
        *(_number(view.median(TTFT, mode)) for mode in Mode),
        "" if best is None else f"{best.median:.2f} ({best.lower_bound:.2f}-{best.upper_bound:.2f})",
        _number(warm),
        "" if longest is None else f"{longest:.2f} ({_number(usual)})",
        _number(bound),
    ]


def _coordinates(point: Point) -> Sequence[str]:
    whole = (point.prompt, point.rank, point.targets, point.adapters, point.tier.value)
    return [*map(str, whole), point.link_words, str(point.decodes)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _point_of(row: Row) -> Point:
    return Point(
        prompt=row.prompt or 0,
        rank=row.ranks[0],
        targets=Targets(row.targets or ""),
        adapters=row.adapters,
        tier=Tier(row.residency),
        link_bytes_per_second=row.link_bytes_per_second,
        decodes=row.decodes or 0,
    )
