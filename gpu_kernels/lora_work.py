"""Work lists of the LoRA kernels: pure numpy, built on the host once per composition of a batch.

A plan is one int32 array, so that one copy brings it to the device. Its prefix is used, the rest is capacity:

- ``HEADER_WORDS`` words: number of shrink items, number of expand items, word offsets of the expand items and of the
  further terms;
- shrink items of ``SHRINK_WORDS`` words each: slot, module, first rank, first column block | blocks << 16, partial row
  stride, first row, rows (0: a vector item's one row), offset of the partials;
- expand items of ``EXPAND_WORDS`` words each: kind, module, first column block | blocks << 16, first row, rows, row
  within the range, terms, first further term | slot, offset of the partials, partial row stride, elements between
  splits, splits, scale (float32 bits) of the first term | first column of the module, columns of the module;
- further terms of ``EXPAND_WORDS`` words, of which those of the term are used.

Shrink leaves partials [splits, rows, ranks rounded up to tiles] in float32 for each segment and module; expand sums
them in the order of the splits, then the terms of its output tile in the order of the segments.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape

HEADER_WORDS = 16
SHRINK_WORDS = 8
EXPAND_WORDS = 16
_BLOCKS_SHIFT = 16

Ints = NDArray[np.int64]
Words = NDArray[np.int32]


class ExpandKind(IntEnum):
    """How an output tile is made.

    WIDE and TALL are rows of one segment, whose ranks fit one tile of few or of many ranks. ANY is rows of any number
    of segments and ranks.
    """

    WIDE = 0
    TALL = 1
    ANY = 2


class PlanCapacity(NamedTuple):
    """What a plan of a batch may need at most: int32 words, and float32 elements of workspace."""

    words: int
    workspace_elems: int


class _Pairs(NamedTuple):
    """Every (segment, module) with a rank, each array [pairs]. ``number`` is [segments, modules], -1 without a pair."""

    segment: Ints
    module: Ints
    rank: Ints
    rows: Ints
    stride: Ints
    splits: Ints
    offset: Ints
    number: Ints


def plan_capacity(
    shape: PointShape, tiles: LoraTiles, *, max_segments: int, max_rows: int, max_rank: int
) -> PlanCapacity:
    """The largest plan of ``max_segments`` segments that together hold ``max_rows`` rows."""
    vector_ranks, vector_columns = tiles.vector
    single = min(max_segments, max_rows)
    row_tiles = max_rows // tiles.rows + min(max_segments, max_rows // 2)
    modules = shape.modules
    shrink = modules * (
        single * _tiles(max_rank, vector_ranks) * min(_tiles(shape.in_features, vector_columns), tiles.max_splits)
        + row_tiles * _tiles(max_rank, tiles.ranks) * min(_tiles(shape.in_features, tiles.span), tiles.max_splits)
    )
    narrowest = min(tiles.wide[1], tiles.tall[1])
    # A segment's two ends cut the rows into at most one more range each.
    expand_tiles = single + row_tiles + 2 * max_segments
    expand = expand_tiles * sum(_tiles(width, narrowest) for width in shape.out_features)
    further = modules * max_rows
    padded = max(_tiles(max_rank, width) * width for width in (vector_ranks, tiles.ranks))
    return PlanCapacity(
        words=HEADER_WORDS + shrink * SHRINK_WORDS + (expand + further) * EXPAND_WORDS,
        workspace_elems=tiles.max_splits * max_rows * modules * padded,
    )


def plan_point(
    segments: NDArray[np.int32],
    segment_scales: NDArray[np.float32],
    ranks: NDArray[np.int32],
    *,
    shape: PointShape,
    tiles: LoraTiles,
    plan: Words,
    workspace_elems: int,
) -> int:
    """Write the plan of one LoRA point into ``plan`` and return how many of its words are used.

    ``segments`` is [n, 3] (row_start, row_stop, slot), ``segment_scales`` [n], and ``ranks`` [slots, modules] holds
    each adapter's largest rank over the layers, 0 where it does not target the module: one plan serves every layer.
    Segments may overlap: every row gets the sum over its segments, in their order. Raises ValueError when a segment is
    empty or names no slot, or the plan is larger than ``plan`` or the workspace.
    """
    if len(segments) and (
        (segments[:, 0] < 0).any()
        or (segments[:, 1] <= segments[:, 0]).any()
        or not ((segments[:, 2] >= 0) & (segments[:, 2] < len(ranks))).all()
    ):
        raise ValueError(f"segments: need 0 <= row_start < row_stop and a slot below {len(ranks)}")
    pairs = _pairs(segments.astype(np.int64), ranks, shape, tiles)
    used_elems = int((pairs.splits * pairs.rows * pairs.stride).sum())
    if used_elems > workspace_elems:
        raise ValueError(f"workspace_elems: {used_elems} partials needed, there is room for {workspace_elems}")
    shrink = _shrink_items(pairs, segments, shape, tiles)
    expand, further = _expand_items(pairs, segments, segment_scales, shape, tiles)
    expand_start = HEADER_WORDS + shrink.size
    further_start = expand_start + expand.size
    words = further_start + further.size
    if words > len(plan):
        raise ValueError(f"plan: {words} words needed, there is room for {len(plan)}")
    plan[:HEADER_WORDS] = 0
    plan[:4] = (len(shrink), len(expand), expand_start, further_start)
    plan[HEADER_WORDS:expand_start] = shrink.reshape(-1)
    plan[expand_start:further_start] = expand.reshape(-1)
    plan[further_start:words] = further.reshape(-1)
    return words


def _pairs(segments: Ints, ranks: NDArray[np.int32], shape: PointShape, tiles: LoraTiles) -> _Pairs:
    """The pairs, and how their columns are split: into as many items as the grid is through with first."""
    present = ranks[segments[:, 2]] > 0
    segment, module = np.nonzero(present)
    rank = ranks[segments[segment, 2], module].astype(np.int64)
    rows = (segments[:, 1] - segments[:, 0])[segment]
    tile_ranks, row_tiles, blocks = _shrink_tiles(rows, shape, tiles)
    rank_tiles = -(-rank // tile_ranks)
    if len(segment):
        least = -(-int(blocks.max()) // tiles.max_splits)
        blocks_each = _balance(
            lambda most: int((rank_tiles * row_tiles * -(-blocks // most)).sum()),
            range(least, int(blocks.max()) + 1),
            tiles.shrink_programs,
        )
        blocks = -(-blocks // blocks_each)
    splits = blocks
    stride = rank_tiles * tile_ranks
    sizes = splits * rows * stride
    number = np.full(present.shape, -1, dtype=np.int64)
    number[segment, module] = np.arange(len(segment))
    return _Pairs(segment, module, rank, rows, stride, splits, np.cumsum(sizes) - sizes, number)


def _shrink_tiles(rows: Ints, shape: PointShape, tiles: LoraTiles) -> tuple[Ints, Ints, Ints]:
    """Each pair's ranks in a tile, row tiles, and column blocks."""
    single = rows == 1
    vector_ranks, vector_columns = tiles.vector
    tile_ranks = np.where(single, vector_ranks, tiles.ranks)
    row_tiles = np.where(single, 1, -(-rows // tiles.rows))
    blocks = np.where(single, _tiles(shape.in_features, vector_columns), _tiles(shape.in_features, tiles.span))
    return tile_ranks, row_tiles, blocks


def _shrink_items(pairs: _Pairs, segments: NDArray[np.int32], shape: PointShape, tiles: LoraTiles) -> Words:
    """[items, SHRINK_WORDS]: each pair's row tiles, in each its rank tiles, in each its splits."""
    tile_ranks, row_tiles, blocks = _shrink_tiles(pairs.rows, shape, tiles)
    rank_tiles = pairs.stride // tile_ranks
    pair, place = _unroll(row_tiles * rank_tiles * pairs.splits)
    splits = pairs.splits[pair]
    split = place % splits
    rank_start = place // splits % rank_tiles[pair] * tile_ranks[pair]
    row = place // (splits * rank_tiles[pair]) * tiles.rows
    # Splits differ by one block at most, and none is empty.
    first = split * blocks[pair] // splits
    count = (split + 1) * blocks[pair] // splits - first
    rows, stride = pairs.rows[pair], pairs.stride[pair]
    columns = (
        segments[pairs.segment[pair], 2],
        pairs.module[pair],
        rank_start,
        first | count << _BLOCKS_SHIFT,
        stride,
        segments[pairs.segment[pair], 0] + row,
        np.where(rows == 1, 0, np.minimum(rows - row, tiles.rows)),
        pairs.offset[pair] + (split * rows + row) * stride + rank_start,
    )
    return _rows(columns, SHRINK_WORDS)


def _expand_items(
    pairs: _Pairs,
    segments: NDArray[np.int32],
    segment_scales: NDArray[np.float32],
    shape: PointShape,
    tiles: LoraTiles,
) -> tuple[Words, Words]:
    """[items, EXPAND_WORDS] and [further terms, EXPAND_WORDS].

    Rows are cut where a segment starts or ends; a group is one such range and one module, with a term per segment.
    """
    bounds = np.unique(segments[:, :2])
    first_range = np.searchsorted(bounds, segments[:, 0])
    segment, place = _unroll(np.searchsorted(bounds, segments[:, 1]) - first_range)
    ranges = first_range[segment] + place
    pair = pairs.number[segment]  # [covers, modules]
    cover, module = np.nonzero(pair >= 0)
    order = np.lexsort((segment[cover], module, ranges[cover]))
    cover, module = cover[order], module[order]
    term_pair, term_range = pair[cover, module], ranges[cover]
    terms = _term_words(pairs, term_pair, bounds[term_range], segments, segment_scales)

    key = term_range * shape.modules + module
    _, first_term, term_count = np.unique(key, return_index=True, return_counts=True)
    further = np.ones(len(key), dtype=bool)
    further[first_term] = False
    further_start = np.cumsum(term_count - 1) - (term_count - 1)
    rank = np.maximum.reduceat(pairs.rank[term_pair], first_term) if len(key) else np.zeros(0, dtype=np.int64)
    row, mod = bounds[term_range[first_term]].astype(np.int64), module[first_term]
    rows = bounds[term_range[first_term] + 1] - row

    kind = _expand_kinds(rank, term_count, tiles)
    widths = np.asarray(shape.out_features)
    group, tile, first, count = _column_blocks(kind, -(-rows // tiles.rows), widths[mod], tiles)
    # Large items first, so that programs that get one item more than others get a small one.
    order = np.argsort(-rank[group] * count, kind="stable")
    group, tile, first, count = group[order], tile[order], first[order], count[order]
    tile_row = tile * tiles.rows
    columns = (
        kind[group],
        mod[group],
        first | count << _BLOCKS_SHIFT,
        row[group] + tile_row,
        np.minimum(rows[group] - tile_row, tiles.rows),
        tile_row,
        term_count[group],
        further_start[group],
        *terms[first_term[group]].T,
        (np.cumsum(widths) - widths)[mod[group]],
        widths[mod[group]],
    )
    items = _rows(columns, EXPAND_WORDS)
    rest = np.zeros((int(further.sum()), EXPAND_WORDS), dtype=np.int32)
    rest[:, 8:14] = terms[further]
    return items, rest


def _expand_kinds(rank: Ints, terms: Ints, tiles: LoraTiles) -> Ints:
    """Each group's ExpandKind; ``rank`` is the largest of its terms."""
    kind = np.where(rank <= tiles.wide[0], ExpandKind.WIDE, ExpandKind.TALL)
    return np.where((terms > 1) | (rank > tiles.tall[0]), ExpandKind.ANY, kind)


def _column_blocks(kind: Ints, row_tiles: Ints, widths: Ints, tiles: LoraTiles) -> tuple[Ints, Ints, Ints, Ints]:
    """Group, row tile, first column block and number of blocks of every expand item.

    An item may have several blocks, but never crosses a chunk.
    """
    tile_columns = np.asarray((tiles.wide[1], tiles.tall[1], tiles.tall[1]))[kind]
    blocks = -(-widths // tile_columns)
    chunk_blocks = np.where(kind == ExpandKind.ANY, 1, np.maximum(tiles.chunk_elems // tile_columns, 1))
    chunks = row_tiles * -(-blocks // chunk_blocks)
    item_blocks = _balance(
        lambda most: int((chunks * -(-chunk_blocks // most)).sum()),
        range(1, int(chunk_blocks.max(initial=1)) + 1),
        tiles.expand_programs,
    )
    pieces = -(-chunk_blocks // item_blocks)
    row_items = -(-blocks // chunk_blocks) * pieces
    group, place = _unroll(row_tiles * row_items)
    chunk, piece = np.divmod(place % row_items[group], pieces[group])
    first = chunk * chunk_blocks[group] + piece * chunk_blocks[group] // pieces[group]
    stop = chunk * chunk_blocks[group] + (piece + 1) * chunk_blocks[group] // pieces[group]
    count = np.minimum(stop, blocks[group]) - first
    kept = count > 0
    return group[kept], (place // row_items[group])[kept], first[kept], count[kept]


def _balance(items: Callable[[int], int], choices: range, programs: int) -> int:
    """The blocks per item of which a grid of ``programs`` is through with all items first.

    ``items(blocks)`` is how many items there are. Programs take one item after the other, and starting one takes as
    long as half a block.
    """
    return min(choices, key=lambda blocks: -(-items(blocks) // programs) * (2 * blocks + 1))


def _term_words(
    pairs: _Pairs,
    pair: Ints,
    row: NDArray[np.int32],
    segments: NDArray[np.int32],
    segment_scales: NDArray[np.float32],
) -> Words:
    """[terms, 6]: slot, offset of the partials of ``row``, row stride, elements between splits, splits, scale."""
    segment, stride = pairs.segment[pair], pairs.stride[pair]
    columns = (
        segments[segment, 2],
        pairs.offset[pair] + (row - segments[segment, 0]) * stride,
        stride,
        pairs.rows[pair] * stride,
        pairs.splits[pair],
        segment_scales.astype(np.float32).view(np.int32)[segment],
    )
    return _rows(columns, 6)


def _unroll(counts: Ints) -> tuple[Ints, Ints]:
    """For [2, 3]: ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2])."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _rows(columns: tuple[NDArray[np.integer], ...], words: int) -> Words:
    rows = np.empty((len(columns[0]), words), dtype=np.int32)
    for index, column in enumerate(columns):
        rows[:, index] = column
    return rows


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
