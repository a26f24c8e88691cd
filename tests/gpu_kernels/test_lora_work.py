"""Work lists of the LoRA kernels: what the kernels would read and write, followed word by word."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segue.gpu_kernels.lora_plan import EXPAND_WORDS, HEADER_WORDS, SHRINK_WORDS, ExpandKind
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape, Regime, choose_tiles
from segue.gpu_kernels.lora_work import plan_capacity, plan_point
from tests.gpu_kernels.reference_lora_work import reference_plan

TILES = replace(
    choose_tiles(Regime.DECODE, chunk_elems=32, page_elems=256, element_bytes=2, multiprocessors=1),
    rows=4,
    ranks=16,
    span=32,
    step=16,
    vector=(8, 16),
    wide=(16, 32),
    tall=(32, 16),
    max_splits=4,
)
SHAPE = PointShape(in_features=144, out_features=(96, 40))


class Cell(NamedTuple):
    """One partial: what it is the sum of."""

    slot: int
    module: int
    row: int
    rank: int
    first_column: int
    stop_column: int


Segment = tuple[int, int, int]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Segment], list[list[int]]]:
    """Segments, which may overlap, and the ranks [slots, modules]."""
    slots = draw(st.integers(1, 4))
    ranks = draw(
        st.lists(
            st.lists(st.sampled_from([0, 1, 8, 16, 17, 32, 40, 64]), min_size=2, max_size=2),
            min_size=slots,
            max_size=slots,
        )
    )
    segments = []
    row = 0
    for _ in range(draw(st.integers(0, 6))):
        row += draw(st.integers(-2, 2))
        row = max(row, 0)
        length = draw(st.sampled_from([1, 1, 2, 4, 5, 9]))
        segments.append((row, row + length, draw(st.integers(0, slots - 1))))
        row += length
    return segments, ranks


def scales_of(segments: list[Segment]) -> NDArray[np.float32]:
    return np.arange(len(segments), dtype=np.float32) + 1


def make_plan(
    segments: list[Segment], ranks: list[list[int]], tiles: LoraTiles, shape: PointShape = SHAPE
) -> tuple[NDArray[np.int32], int]:
    """The used words of a plan whose array has just the promised capacity, and the room for partials."""
    rows = sum(stop - start for start, stop, _ in segments)
    capacity = plan_capacity(
        shape, tiles, max_segments=len(segments), max_rows=rows, max_rank=int(np.max(ranks, initial=1))
    )
    plan = np.full(capacity.words, -1, dtype=np.int32)
    used = plan_point(
        np.asarray(segments, dtype=np.int32).reshape(-1, 3),
        scales_of(segments),
        np.asarray(ranks, dtype=np.int32),
        shape=shape,
        tiles=tiles,
        plan=plan,
        workspace_elems=capacity.workspace_elems,
    )
    assert (plan[used:] == -1).all()
    return plan[:used], capacity.workspace_elems


def written_cells(plan: NDArray[np.int32], ranks: list[list[int]], tiles: LoraTiles) -> dict[int, Cell]:
    """Every partial that shrink writes, padded ranks too; none is written twice."""
    cells: dict[int, Cell] = {}
    for item in plan[HEADER_WORDS : plan[2]].reshape(-1, SHRINK_WORDS).tolist():
        slot, module, rank_start, blocks, stride, row, rows, offset = item
        tile_ranks, columns = tiles.vector if rows == 0 else (tiles.ranks, tiles.span)
        first, count = blocks & 0xFFFF, blocks >> 16
        assert count > 0
        assert rank_start < ranks[slot][module]
        for i in range(max(rows, 1)):
            for j in range(tile_ranks):
                place = offset + i * stride + j
                assert place not in cells
                stop = min((first + count) * columns, SHAPE.in_features)
                cells[place] = Cell(slot, module, row + i, rank_start + j, first * columns, stop)
    return cells


@given(batches())
def test_every_row_module_and_rank_is_covered_once(batch: tuple[list[Segment], list[list[int]]]) -> None:
    segments, ranks = batch
    plan, workspace_elems = make_plan(segments, ranks, TILES)
    cells = written_cells(plan, ranks, TILES)
    assert not cells or (min(cells) >= 0 and max(cells) < workspace_elems)

    added: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    items = plan[plan[2] : plan[3]].reshape(-1, EXPAND_WORDS)
    assert len(items) == plan[1]
    assert plan[0] * SHRINK_WORDS == plan[2] - HEADER_WORDS
    further = plan[plan[3] :].reshape(-1, EXPAND_WORDS)
    tile_columns = {ExpandKind.WIDE: TILES.wide[1], ExpandKind.TALL: TILES.tall[1], ExpandKind.ANY: TILES.tall[1]}
    for item in items:
        kind, module, blocks, row, rows, row_in_range, terms, first_further = item[:8].tolist()
        out_start, width = item[14:].tolist()
        first, count = (blocks & 0xFFFF) * tile_columns[kind], (blocks >> 16) * tile_columns[kind]
        assert first < width
        assert 0 < rows <= TILES.rows
        assert first // TILES.chunk_elems == (first + count - 1) // TILES.chunk_elems or count == tile_columns[kind]
        assert terms == 1 or kind == ExpandKind.ANY
        for term in (item, *further[first_further : first_further + terms - 1]):
            slot, offset, stride, split_stride, splits = term[8:13].tolist()
            scale = float(term[13:14].view(np.float32)[0])
            rank = ranks[slot][module]
            assert kind != ExpandKind.WIDE or rank <= TILES.wide[0]
            assert kind != ExpandKind.TALL or rank <= TILES.tall[0]
            for i in range(rows):
                for j in range(rank):
                    place = offset + (row_in_range + i) * stride + j
                    read = [cells[place + split * split_stride] for split in range(splits)]
                    assert {cell[:4] for cell in read} == {(slot, module, row + i, j)}
                    bounds = [0, *(cell.stop_column for cell in read)]
                    assert bounds == [*(cell.first_column for cell in read), SHAPE.in_features]
                for column in range(first, min(first + count, width)):
                    added[row + i, out_start + column].append(scale)

    expected: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for number, (start, stop, slot) in enumerate(segments):
        column = 0
        for module, width in enumerate(SHAPE.out_features):
            if ranks[slot][module]:
                for row in range(start, stop):
                    for place in range(column, column + width):
                        expected[row, place].append(number + 1.0)
            column += width
    assert added == expected


TILE_SETS = [
    TILES,
    replace(TILES, max_splits=1, shrink_programs=1, expand_programs=1),
    replace(TILES, max_splits=8, shrink_programs=7, expand_programs=5, rows=3),
    *(choose_tiles(item, chunk_elems=1024, page_elems=4096, element_bytes=2, multiprocessors=132) for item in Regime),
]


@given(
    batches(),
    st.sampled_from(TILE_SETS),
    st.sampled_from([SHAPE, PointShape(in_features=4096, out_features=(2048, 5000))]),
)
def test_every_word_is_that_of_the_reference(
    batch: tuple[list[Segment], list[list[int]]], tiles: LoraTiles, shape: PointShape
) -> None:
    segments, ranks = batch
    plan, _ = make_plan(segments, ranks, tiles, shape)
    wanted, _ = reference_plan(
        np.asarray(segments, dtype=np.int32).reshape(-1, 3),
        scales_of(segments),
        np.asarray(ranks, np.int32),
        shape,
        tiles,
    )
    assert plan.tolist() == wanted.tolist()


@given(batches())
def test_a_plan_that_just_fits_is_written_and_one_that_does_not_leaves_all_as_it_is(
    batch: tuple[list[Segment], list[list[int]]],
) -> None:
    segments, ranks = batch
    rows, scales = np.asarray(segments, dtype=np.int32).reshape(-1, 3), scales_of(segments)
    table = np.asarray(ranks, dtype=np.int32)
    wanted, elems = reference_plan(rows, scales, table, SHAPE, TILES)
    plan = np.full(len(wanted), -1, dtype=np.int32)
    write = partial(plan_point, rows, scales, table, shape=SHAPE, tiles=TILES)
    with pytest.raises(ValueError, match=f"plan: {len(wanted)} words needed, there is room for {len(wanted) - 1}"):
        write(plan=plan[:-1], workspace_elems=elems)
    with pytest.raises(ValueError, match=f"workspace_elems: {elems} partials needed, there is room for {elems - 1}"):
        write(plan=plan, workspace_elems=elems - 1)
    assert (plan == -1).all()
    assert write(plan=plan, workspace_elems=elems) == len(plan)
    assert plan.tolist() == wanted.tolist()


def test_time_follows_the_ranks_that_are_present() -> None:
    """Rank 8 beside rank 64 makes the items of each, not twice those of rank 64."""
    alone = [make_plan([(0, 1, slot)], [[8, 8], [64, 64]], TILES)[0] for slot in (0, 1)]
    both = make_plan([(0, 1, 0), (1, 2, 1)], [[8, 8], [64, 64]], TILES)[0]
    rank_tiles = [len({tuple(item[1:3]) for item in plan[16 : plan[2]].reshape(-1, 8).tolist()}) for plan in alone]
    assert rank_tiles == [2, 16]
    assert len({tuple(item[:3]) for item in both[16 : both[2]].reshape(-1, 8).tolist()}) == 18


def test_large_items_come_first() -> None:
    plan = make_plan([(0, 1, 0), (1, 2, 1)], [[8, 8], [64, 64]], TILES)[0]
    slots = plan[plan[2] : plan[3]].reshape(-1, EXPAND_WORDS)[:, 8].tolist()
    assert slots == sorted(slots, reverse=True)


@pytest.mark.parametrize("segment", [(3, 3, 0), (4, 2, 0), (-1, 2, 0), (0, 2, 1), (0, 2, -1)])
def test_wrong_segments_are_refused(segment: Segment) -> None:
    with pytest.raises(ValueError, match="segments"):
        plan_point(
            np.asarray([segment], dtype=np.int32),
            np.ones(1, dtype=np.float32),
            np.full((1, 2), 8, dtype=np.int32),
            shape=SHAPE,
            tiles=TILES,
            plan=np.zeros(10_000, dtype=np.int32),
            workspace_elems=10_000,
        )


@pytest.mark.parametrize(("words", "elems", "match"), [(40, 10_000, "plan"), (10_000, 10, "workspace_elems")])
def test_a_plan_that_does_not_fit_is_refused(words: int, elems: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan_point(
            np.asarray([(0, 4, 0)], dtype=np.int32),
            np.ones(1, dtype=np.float32),
            np.full((1, 2), 8, dtype=np.int32),
            shape=SHAPE,
            tiles=TILES,
            plan=np.zeros(words, dtype=np.int32),
            workspace_elems=elems,
        )


@pytest.mark.parametrize(("scales", "modules"), [(1, 2), (3, 2), (2, 1), (2, 3)])
def test_arrays_of_other_lengths_are_refused(scales: int, modules: int) -> None:
    with pytest.raises(ValueError, match="need 2 modules and 2 scales"):
        plan_point(
            np.asarray([(0, 4, 0), (4, 5, 0)], dtype=np.int32),
            np.ones(scales, dtype=np.float32),
            np.full((1, modules), 8, dtype=np.int32),
            shape=SHAPE,
            tiles=TILES,
            plan=np.zeros(10_000, dtype=np.int32),
            workspace_elems=10_000,
        )


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        replace(TILES, rows=0)
    with pytest.raises(ValueError, match="page_elems"):
        replace(TILES, page_elems=33)
    with pytest.raises(ValueError, match="span"):
        replace(TILES, span=64)
    with pytest.raises(ValueError, match="in_features"):
        PointShape(in_features=0, out_features=(8,))
    with pytest.raises(ValueError, match="out_features"):
        PointShape(in_features=8, out_features=())
