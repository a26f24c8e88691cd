"""Plots as SVG, for a page that needs nothing else. Pure."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

COLORS = ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#5c4d7d", "#8d6a4f", "#3d5a80", "#9c6644")
_WIDTH, _HEIGHT = 640.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 16.0, 44.0
_BAR_PIXELS, _LABEL_PIXELS = 22.0, 180.0
_TICKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points in order. ``ranges`` are the ends of a vertical line at each point; ``is_line`` joins the points, which
    are dots else."""

    name: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    is_line: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """``x_marks`` and ``y_marks`` are named values that get a dashed line across. ``x_log`` is for positive values."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    x_marks: Sequence[tuple[str, float]] = field(default=())
    y_marks: Sequence[tuple[str, float]] = field(default=())
    y_most: float | None = None
    x_log: bool = False


def draw_plot(plot: Plot) -> str:
    """The plot; a remark in place of one without points."""
    points = [point for series in plot.series for point in series.points]
    if not points:
        return "<p>Nothing was measured.</p>"
    xs = [x for x, _ in points] + [x for _, x in plot.x_marks]
    ys = [y for _, y in points] + [y for _, y in plot.y_marks]
    x_axis = _Axis.over(xs, _LEFT, _WIDTH - _RIGHT, log=plot.x_log)
    y_most = plot.y_most if plot.y_most is not None else max(ys)
    y_axis = _Axis.over([0.0, y_most], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, plot)]
    for place, series in enumerate(plot.series):
        parts.append(_draw_series(series, COLORS[place % len(COLORS)], x_axis, y_axis))
    if len(plot.series) > 1:
        parts.append(_legend([series.name for series in plot.series]))
    return _svg(_WIDTH, _HEIGHT, parts)


def draw_bars(labels: Sequence[str], values: Sequence[float], ranges: Sequence[tuple[float, float]]) -> str:
    """Horizontal bars of shares from 0 to 1, with a line from the lower to the upper end of each one's range."""
    axis = _Axis(low=0.0, high=1.0, begin=_LABEL_PIXELS, end=_WIDTH - 60.0)
    parts = []
    for place, (label, value, (low, high)) in enumerate(zip(labels, values, ranges, strict=True)):
        top = 4 + place * _BAR_PIXELS
        middle = top + _BAR_PIXELS / 2
        parts += [
            _text(_LABEL_PIXELS - 8, middle + 4, label, anchor="end"),
            f'<rect x="{axis.begin:.1f}" y="{top + 3:.1f}" width="{axis.at(value) - axis.begin:.1f}" '
            f'height="{_BAR_PIXELS - 6:.1f}" fill="{COLORS[0]}"/>',
            _line(axis.at(low), middle, axis.at(high), middle, "#222"),
            _text(axis.end + 8, middle + 4, f"{value:.1%}"),
        ]
    return _svg(_WIDTH, 8 + len(labels) * _BAR_PIXELS, parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, log: bool = False) -> _Axis:
        """An axis that has room for all values."""
        low, high = min(values), max(values)
        if not log:
            low = min(low, 0.0)
        if high <= low:
            high = low * 2 if low > 0 else low + 1
        return cls(low=low, high=high, begin=begin, end=end, log=log)

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond the axis are put on its end."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        part = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.begin + part * (self.end - self.begin)

    def ticks(self) -> Sequence[float]:
        if self.log:
            return [self.low * (self.high / self.low) ** (place / (_TICKS - 1)) for place in range(_TICKS)]
        step = (self.high - self.low) / (_TICKS - 1)
        power = 10 ** math.floor(math.log10(step))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)
        first = math.ceil(self.low / step)
        return [step * place for place in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, plot: Plot) -> str:
    parts = []
    left, right, base = x_axis.begin, x_axis.end, y_axis.begin
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts += [_line(left, y, right, y, "#e4e4e4"), _text(left - 6, y + 4, f"{tick:g}", anchor="end")]
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts += [_line(x, base, x, base + 4, "#666"), _text(x, base + 17, f"{tick:.3g}", anchor="middle")]
    parts.append(_line(left, base, right, base, "#666"))
    for name, value in plot.y_marks:
        y = y_axis.at(value)
        parts += [_line(left, y, right, y, "#222", dashed=True), _text(right, y - 4, name, anchor="end")]
    for place, (name, value) in enumerate(plot.x_marks):
        x, y = x_axis.at(value), y_axis.end + 10 + 14 * place
        parts += [_line(x, base, x, y_axis.end, "#222", dashed=True), _text(x - 4, y, name, anchor="end")]
    parts.append(_text((left + right) / 2, _HEIGHT - 8, plot.x_label, anchor="middle"))
    middle = (base + y_axis.end) / 2
    parts.append(
        f'<text x="14" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 14 {middle:.1f})">'
        f"{html.escape(plot.y_label)}</text>"
    )
    return "".join(parts)


def _draw_series(series: Series, color: str, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    parts = []
    if series.is_line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    for (x, _), (low, high) in zip(places, series.ranges, strict=False):
        parts.append(_line(x, y_axis.at(low), x, y_axis.at(high), color))
    if not series.is_line or series.ranges:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}" fill-opacity="0.7"/>' for x, y in places]
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    parts = []
    for place, name in enumerate(names):
        y = _TOP + 12 + 16 * place
        parts.append(
            f'<rect x="{_LEFT + 12:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{COLORS[place % len(COLORS)]}"/>'
        )
        parts.append(_text(_LEFT + 28, y, name))
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="11">{"".join(parts)}</svg>'
