"""Passes wait for a set of graphs, but not for one that a slow disk keeps."""

from __future__ import annotations

import pytest

from segue.engine.planner import counted_passes

MAX_PASSES = 16


@pytest.mark.parametrize(
    ("under_way", "awaiting", "idle_sets", "may_start"),
    [
        (3, 0, None, 13),  # Nothing is ever recorded.
        (0, 0, 2, 2),
        (1, 0, 1, 1),
        (2, 0, 0, 0),
        (2, 1, 0, 0),  # The other will end soon.
        (2, 2, 0, 14),  # Nobody knows when.
        (5, 5, 1, 1),
        (16, 16, 0, 0),
    ],
)
def test_how_many_passes_may_start(under_way: int, awaiting: int, idle_sets: int | None, may_start: int) -> None:
    assert MAX_PASSES - counted_passes(under_way, awaiting, idle_sets, MAX_PASSES) == may_start
