"""What a LoRA plan's every word is, in whole-array numpy: the meaning of ``segue.gpu_kernels.lora_work.plan_point``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segue.gpu_kernels.lora_plan import EXPAND_WORDS, HEADER_WORDS, SHRINK_WORDS, ExpandKind
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape

_BLOCKS_SHIFT = 16

Ints = NDArray[np.int64]
Words = NDArray[np.int32]


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


def reference_plan(
    segments: NDArray[np.int32],
    segment_scales: NDArray[np.float32],
    ranks: NDArray[np.int32],
    shape: PointShape,
    tiles: LoraTiles,
) -> tuple[Words, int]:
    """The words of the plan, and how many elements its partials take."""
    pairs = _pairs(segments.astype(np.int64), ranks, shape, tiles)
    used_elems = int((pairs.splits * pairs.rows * pairs.stride).sum())
    shrink = _shrink_items(pairs, segments, shape, tiles)
    expand, further = _expand_items(pairs, segments, segment_scales, shape, tiles)
    header = np.zeros(HEADER_WORDS, dtype=np.int32)
    expand_start = HEADER_WORDS + shrink.size
    header[:4] = (len(shrink), len(expand), expand_start, expand_start + expand.size)
    return np.concatenate((header, shrink.reshape(-1), expand.reshape(-1), further.reshape(-1))), used_elems


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
