"""The map of who is fastest where, and in words where the CPU's help pays."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from segue.bench.coldstart.points import COLD_MODES, RIVALS, Mode
from segue.bench.coldstart.view import TTFT, PointView
from segue.bench.random_checkpoints import Targets

_CELL_WIDTH, _CELL_HEIGHT = 46, 22
_LEFT, _TOP = 150, 58


def winner_map(views: Sequence[PointView], colours: Mapping[Mode, str]) -> str:
    """A grid for each tier and link: prompt and adapters down, rank and targets across."""
    grids: dict[tuple[str, str], list[PointView]] = {}
    for view in views:
        grids.setdefault((view.point.tier.value, view.point.link_words), []).append(view)
    ordered = sorted(grids.items(), key=lambda item: (item[0][0] != "host", -_link(item[1][0])))
    charts = "".join(f"<div>{_grid(tier, link, group, colours)}</div>" for (tier, link), group in ordered)
    return f"<div style='display:flex;flex-wrap:wrap;gap:18px'>{charts}</div>"


def region_words(views: Sequence[PointView]) -> list[str]:
    """How often each mode is the fastest of those without a planner, and where the planner gains most over streaming;
    of what was measured."""
    measured = [view for view in views if not view.predicted]
    wins = {mode: sum(view.winner(RIVALS) is mode for view in measured) for mode in RIVALS}
    words = ["Without the planner, of the points that were measured: "
             + ", ".join(f"{mode} is the fastest at {count}" for mode, count in wins.items()) + "."]  # fmt: skip
    gains = [(gain, view) for view in measured if (gain := view.gain_over_stream) is not None]
    if gains:
        most, view = max(gains, key=lambda item: item[0])
        share = view.rows[TTFT, Mode.PLANNER].cpu_share
        words.append(
            f"The planner is {most:.2f} times as fast as streaming at best, at {view.point}, where the CPU computed "
            f"{share or 0.0:.0%} of the layers; it is at least 1.2 times as fast at "
            f"{sum(gain >= 1.2 for gain, _ in gains)} of {len(gains)} points."
        )
    return words


def _grid(tier: str, link: str, views: Sequence[PointView], colours: Mapping[Mode, str]) -> str:
    rows = sorted({(view.point.adapters, view.point.prompt) for view in views})
    columns = sorted({_column(view) for view in views})
    width, height = _LEFT + _CELL_WIDTH * len(columns) + 8, _TOP + _CELL_HEIGHT * len(rows) + 8
    parts = [f"<text x='0' y='14' font-weight='bold'>from {tier}, link {link}</text>"]
    for place, (_, targets, rank) in enumerate(columns):
        x = _LEFT + _CELL_WIDTH * (place + 0.5)
        parts.append(f"<text x='{x}' y='{_TOP - 20}' text-anchor='middle'>{targets}</text>")
        parts.append(f"<text x='{x}' y='{_TOP - 7}' text-anchor='middle'>r {rank}</text>")
    for place, (adapters, prompt) in enumerate(rows):
        y = _TOP + _CELL_HEIGHT * place + 15
        parts.append(f"<text x='{_LEFT - 6}' y='{y}' text-anchor='end'>{adapters} x prompt {prompt}</text>")
    for view in views:
        point = view.point
        x = _LEFT + _CELL_WIDTH * columns.index(_column(view))
        y = _TOP + _CELL_HEIGHT * rows.index((point.adapters, point.prompt))
        parts.append(_cell(view, x, y, colours))
    return f"<svg width='{width}' height='{height}' role='img'>{''.join(parts)}</svg>"


def _column(view: PointView) -> tuple[int, Targets, int]:
    """To sort by: targets in their own order, then rank."""
    return list(Targets).index(view.point.targets), view.point.targets, view.point.rank


def _cell(view: PointView, x: int, y: int, colours: Mapping[Mode, str]) -> str:
    mode = view.winner()
    if mode is None:
        return ""
    own, warm = view.median(TTFT, mode) or 0.0, view.median(TTFT, Mode.WARM)
    times = ", ".join(f"{each} {value:.2f} ms" for each in (Mode.WARM, *COLD_MODES)
                      if (value := view.median(TTFT, each)) is not None)  # fmt: skip
    title = f"{view.point}{' (predicted)' if view.predicted else ''}: {times}"
    fill, border = ("0.35", "stroke='#555' stroke-dasharray='3 2'") if view.predicted else ("0.95", "stroke='#fff'")
    label = "" if not warm else f"{own / warm:.2f}"
    return (
        f"<g><title>{html.escape(title)}</title><rect x='{x + 1}' y='{y + 1}' width='{_CELL_WIDTH - 2}' "
        f"height='{_CELL_HEIGHT - 2}' fill='{colours[mode]}' fill-opacity='{fill}' {border}/>"
        f"<text x='{x + _CELL_WIDTH / 2}' y='{y + 15}' text-anchor='middle'>{label}</text></g>"
    )


def _link(view: PointView) -> float:
    """Bytes per second, to sort by."""
    link = view.point.link_bytes_per_second
    return float("inf") if link is None else link
