"""Tasks: what is refused, and how rows are split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.cpu_lora import CpuLoraConfig, DeltaTask, ElementType, SharedLayout
from segue.cpu_lora.jobs import check_tasks, split_rows

LAYOUT = SharedLayout.plan(
    CpuLoraConfig(workers=4, row_bytes=1 << 16, delta_bytes=1 << 16, store_bytes=10_000, max_tasks=9)
)


def task(
    rows: tuple[int, int], columns: tuple[int, int], rank: int = 0, a: int = 0, b: int = 0, scale: float = 1.0,
    dtype: ElementType = ElementType.FLOAT32,
) -> DeltaTask:  # fmt: skip
    return DeltaTask(
        row_start=rows[0], row_stop=rows[1], out_offset=columns[0], out_features=columns[1] - columns[0], rank=rank,
        a_offset_bytes=a, b_offset_bytes=b, scale=scale, dtype=dtype,
    )  # fmt: skip


SPANS = st.tuples(st.integers(-1, 6), st.integers(-1, 6))


@given(st.lists(st.tuples(SPANS, SPANS), max_size=10), st.integers(1, 5), st.integers(1, 5))
def test_tasks_must_cover_every_delta_once(
    spans: list[tuple[tuple[int, int], tuple[int, int]]], row_count: int, delta_width: int
) -> None:
    inside = all(0 <= r0 < r1 <= row_count and 0 <= c0 < c1 <= delta_width for (r0, r1), (c0, c1) in spans)
    painted = np.zeros((row_count, delta_width), int)
    for (r0, r1), (c0, c1) in spans:
        if inside:
            painted[r0:r1, c0:c1] += 1
    tasks = [task(rows, columns) for rows, columns in spans]
    if inside and (painted == 1).all() and 1 <= len(tasks) <= LAYOUT.max_tasks:
        check_tasks(tasks, row_count, 8, delta_width, LAYOUT)
    else:
        with pytest.raises(ValueError, match="tasks"):
            check_tasks(tasks, row_count, 8, delta_width, LAYOUT)


@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_any_exact_cover_is_accepted(data: st.DataObject, row_count: int, delta_width: int) -> None:
    """Cut the rectangle in two again and again: what comes out covers it exactly."""
    pieces = [((0, row_count), (0, delta_width))]
    for _ in range(data.draw(st.integers(0, 8))):
        (rows, columns) = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        if rows[1] - rows[0] > 1 and data.draw(st.booleans()):
            cut = data.draw(st.integers(rows[0] + 1, rows[1] - 1))
            pieces += [((rows[0], cut), columns), ((cut, rows[1]), columns)]
        elif columns[1] - columns[0] > 1:
            cut = data.draw(st.integers(columns[0] + 1, columns[1] - 1))
            pieces += [(rows, (columns[0], cut)), (rows, (cut, columns[1]))]
        else:
            pieces.append((rows, columns))
    check_tasks([task(rows, columns) for rows, columns in pieces], row_count, 8, delta_width, LAYOUT)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (task((0, 4), (0, 6), rank=1025), r"tasks\[0\].rank: must be 0 to 1024, is 1025"),
        (task((0, 4), (0, 6), rank=-1), r"tasks\[0\].rank"),
        (task((0, 4), (0, 6), rank=2, scale=float("nan")), r"tasks\[0\].scale"),
        (task((0, 4), (0, 6), rank=2, a=2), r"tasks\[0\].a_offset_bytes: 2 is no multiple of 4"),
        (task((0, 4), (0, 6), rank=2, b=3, dtype=ElementType.FLOAT16), r"tasks\[0\].b_offset_bytes: 3 is no multiple"),
        (task((0, 4), (0, 6), rank=2, a=-4), r"tasks\[0\].a_offset_bytes: 2 x 8 elements at -4 exceed"),
        (task((0, 4), (0, 6), rank=2, a=10_000 - 60), r"tasks\[0\].a_offset_bytes: 2 x 8 elements at 9940 exceed"),
        (task((0, 4), (0, 6), rank=2, b=10_000 - 44), r"tasks\[0\].b_offset_bytes: 2 x 6 elements at 9956 exceed"),
        (task((0, 4), (0, 7)), r"tasks\[0\].out_offset: 7 columns at 0 exceed 6"),
        (task((0, 5), (0, 6)), r"tasks\[0\].row_start, row_stop: 0, 5 is no range of 4 rows"),
        (task((0, 3), (0, 6)), r"tasks: cover 18 of 4 x 6 deltas"),
    ],
)
def test_wrong_tasks_are_refused_by_name(bad: DeltaTask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tasks([bad], 4, 8, 6, LAYOUT)


def test_weights_may_end_where_the_store_ends() -> None:
    check_tasks([task((0, 4), (0, 6), rank=2, a=10_000 - 64, b=10_000 - 48)], 4, 8, 6, LAYOUT)


@given(
    st.integers(1, 300), st.integers(1, 20), st.integers(1, 16), st.lists(st.integers(0, 64), min_size=1, max_size=5)
)
def test_split_covers_all_rows_without_needless_parts(
    row_count: int, parts: int, min_rows: int, ranks: list[int]
) -> None:
    edges = np.linspace(0, row_count, len(ranks) + 1).astype(int)
    tasks = [
        task((int(start), int(stop)), (0, 32), rank=rank)
        for start, stop, rank in zip(edges, edges[1:], ranks, strict=False)
        if start < stop
    ]
    ranges = split_rows(tasks, row_count, 64, parts, min_rows)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(row_count))
    assert len(ranges) <= max(1, min(parts, row_count // min_rows))
    assert all(start < stop for start, stop in ranges)


def test_split_balances_work_not_rows() -> None:
    tasks = [task((0, 64), (0, 32), rank=64), task((64, 128), (0, 32), rank=8)]
    (_, first_stop), *_ = split_rows(tasks, 128, 64, 2, 4)
    assert 32 <= first_stop <= 40
