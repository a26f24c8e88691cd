"""One page of plots for a report. Needs matplotlib, which the extra ``bench`` installs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from segue.bench.report import Report, Row
from segue.bench.tables import mix_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_ROW_INCHES = 0.3
_WIDTH_INCHES = 10.0


class PlotError(Exception):
    """No plot can be made. The message is one line."""


def require_plots(path: Path) -> None:
    """Raises PlotError where ``write_plot`` would, so that nothing is measured in vain."""
    if path.suffix not in SUFFIXES:
        raise PlotError(f"--plot: must end in {' or '.join(SUFFIXES)}, is {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("--plot: needs matplotlib, which is not installed: pip install 'segue[bench]'")


def write_plot(report: Report, path: Path) -> None:
    """Draw what the report has: decode steps by batch and mix, first tokens by prompt, kernels by bandwidth.

    Raises PlotError, and OSError where the file cannot be written.
    """
    require_plots(path)
    from matplotlib.figure import Figure

    parts: list[tuple[list[Row], Callable[[Axes, Sequence[Row]], None]]] = [
        ([row for row in report.rows if row.measure == "decode_step_ms"], _draw_decode),
        ([row for row in report.rows if row.measure == "ttft_ms"], _draw_first_tokens),
        ([row for row in report.rows if row.copy_fraction is not None], _draw_bandwidth),
    ]
    drawn = [(rows, draw) for rows, draw in parts if rows]
    if not drawn:
        raise PlotError("--plot: the report has nothing to draw")
    heights = [2.0 + _ROW_INCHES * len(rows) for rows, _ in drawn]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
    for (rows, draw), panel in zip(drawn, axes[:, 0], strict=True):
        draw(panel, rows)
    figure.suptitle(f"{report.machine.gpu or report.machine.cpu}, commit {report.short_commit}")
    figure.savefig(path)


def _draw_decode(axes: Axes, rows: Sequence[Row]) -> None:
    labels = [f"batch {row.batch}, {mix_words(row)}{f', {row.when}' if row.when else ''}" for row in rows]
    _bars(axes, labels, [row.median for row in rows])
    for place, row in enumerate(rows):
        axes.plot([row.p10, row.p90], [place, place], color="black")
    axes.set_xlabel("decode step, ms: median, p10 to p90")


def _draw_first_tokens(axes: Axes, rows: Sequence[Row]) -> None:
    for label in dict.fromkeys(mix_words(row) for row in rows):
        points = sorted((row.prompt or 0, row.median) for row in rows if mix_words(row) == label)
        axes.plot([prompt for prompt, _ in points], [median for _, median in points], marker="o", label=label)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("time to first token, ms")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_bandwidth(axes: Axes, rows: Sequence[Row]) -> None:
    _bars(axes, [f"{row.case}, {row.point}" for row in rows], [row.copy_fraction or 0.0 for row in rows])
    axes.set_xlabel("part of the copy bandwidth")
    axes.set_xlim(0, 1)


def _bars(axes: Axes, labels: Sequence[str], values: Sequence[float]) -> None:
    axes.barh(range(len(labels)), values)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
