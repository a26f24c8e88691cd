"""Plots as SVG text, for a page that loads nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from segue.bench.coldstart.points import Mode

_Colours = Mapping[Mode, str]
_LABEL_WIDTH = 480
_PLOT_WIDTH = 560
_ROW_HEIGHT = 16


def legend(colours: _Colours) -> str:
    """A patch of each mode's colour, with its name."""
    parts = [
        f"<span style='display:inline-block;width:12px;height:12px;background:{colour};margin:0 6px 0 14px'></span>"
        f"{html.escape(mode)}"
        for mode, colour in colours.items()
    ]
    return f"<p>{''.join(parts)}</p>"


def forest(rows: Sequence[tuple[str, float, float, float]], *, reference: float, colour: str) -> str:
    """A line for each (label, value, lower, upper), on a logarithmic axis with a mark at ``reference``."""
    x = _log_axis([value for _, *values in rows for value in (*values, 1.0, reference)], _LABEL_WIDTH, _PLOT_WIDTH)
    height = _ROW_HEIGHT * len(rows) + 30
    parts = []
    for mark, dash in ((1.0, ""), (reference, "stroke-dasharray='4 3'")):
        parts.append(f"<line x1='{x(mark):.1f}' x2='{x(mark):.1f}' y1='0' y2='{height - 22}' stroke='#999' {dash}/>")
    parts.append(f"<text x='{x(1.0):.1f}' y='{height - 8}' text-anchor='end'>1.00</text>")
    parts.append(f"<text x='{x(reference):.1f}' y='{height - 8}' text-anchor='start'> {reference:.2f}</text>")
    for place, (label, value, lower, upper) in enumerate(rows):
        y = _ROW_HEIGHT * place + 10
        parts.append(f"<text x='{_LABEL_WIDTH - 8}' y='{y + 4}' text-anchor='end'>{html.escape(label)}</text>")
        parts.append(
            f"<line x1='{x(lower):.1f}' x2='{x(upper):.1f}' y1='{y}' y2='{y}' stroke='{colour}' stroke-width='2'/>"
            f"<circle cx='{x(value):.1f}' cy='{y}' r='3.5' fill='{colour}'><title>{value:.3f}, {lower:.3f} to "
            f"{upper:.3f}</title></circle>"
        )
    return _svg(_LABEL_WIDTH + _PLOT_WIDTH + 20, height, parts)


def bars(groups: Sequence[tuple[str, Mapping[Mode, float]]], colours: _Colours) -> str:
    """For each group a bar for each mode."""
    most = max(value for _, values in groups for value in values.values())
    parts, y = [], 0
    for label, values in groups:
        parts.append(f"<text x='{_LABEL_WIDTH - 8}' y='{y + 12}' text-anchor='end'>{html.escape(label)}</text>")
        for mode, value in values.items():
            width = (_PLOT_WIDTH - 60) * value / most
            parts.append(
                f"<rect x='{_LABEL_WIDTH}' y='{y}' width='{width:.1f}' height='9' fill='{colours[mode]}'>"
                f"<title>{html.escape(mode)}: {value:.2f} ms</title></rect>"
                f"<text x='{_LABEL_WIDTH + width + 4:.1f}' y='{y + 9}'>{value:.1f}</text>"
            )
            y += 11
        y += 10
    return _svg(_LABEL_WIDTH + _PLOT_WIDTH + 20, y + 4, parts)


def lines_chart(title: str, series: Mapping[Mode, Sequence[tuple[int, float, bool]]], colours: _Colours) -> str:
    """(x, y, predicted) of each mode, on logarithmic axes."""
    width, height, left, bottom = 370, 230, 46, 26
    points = [point for values in series.values() for point in values]
    x = _log_axis([point[0] for point in points], left, width - left - 14)
    upward = _log_axis([point[1] for point in points], 0, height - bottom - 30)
    parts = [f"<text x='4' y='13'>{html.escape(title)}</text>"]

    def y(value: float) -> float:
        return height - bottom - upward(value)

    parts += [
        f"<text x='{x(tick):.1f}' y='{height - 8}' text-anchor='middle'>{tick}</text>"
        for tick in sorted({point[0] for point in points})
    ]
    times = [point[1] for point in points]
    parts += [
        f"<text x='{left - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:.3g}</text>"
        for value in (min(times), max(times))
    ]
    for mode, values in series.items():
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value, _ in values)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colours[mode]}' stroke-width='1.5'/>")
        for at, value, predicted in values:
            fill = "#fff" if predicted else colours[mode]
            parts.append(
                f"<circle cx='{x(at):.1f}' cy='{y(value):.1f}' r='3' fill='{fill}' stroke='{colours[mode]}'>"
                f"<title>{html.escape(mode)}: {value:.2f} ms{' (predicted)' if predicted else ''}</title></circle>"
            )
    return _svg(width, height, parts)


def _log_axis(values: Sequence[float], start: float, length: float) -> Callable[[float], float]:
    """Where a value lies between ``start`` and ``start + length``, with a little room at both ends."""
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.05 * (high - low) or 0.1
    low, high = low - room, high + room
    return lambda value: start + length * (math.log(value) - low) / (high - low)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return f"<svg width='{width}' height='{height}' role='img'>{''.join(parts)}</svg>"
