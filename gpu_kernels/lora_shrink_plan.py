"""The shrink items of a LoRA plan: every pair, cut into rows, ranks and columns. ``lora_plan`` has the words."""

from __future__ import annotations

import numpy as np

from segue.compiled import INT, INT_ROWS, LONG_ROWS, LONGS, compiled, types
from segue.gpu_kernels.lora_plan import BLOCKS_SHIFT, PAIRS, SIZES, Longs, Pairs, PlanSizes, Words, ceil_div, grid_time


@compiled(types.UniTuple(INT, 2)(INT_ROWS, INT_ROWS, SIZES, LONG_ROWS), nogil=False)
def measure_pairs(segments: Words, ranks: Words, sizes: PlanSizes, strides: Longs) -> tuple[int, int]:
    """Tiles [rows, ranks] of all pairs of one row, and of the others; -1 where a segment is wrong. Fills in strides."""
    single_tiles = dot_tiles = 0
    for segment in range(len(segments)):
        rows, slot = segments[segment, 1] - segments[segment, 0], segments[segment, 2]
        if segments[segment, 0] < 0 or rows <= 0 or slot < 0 or slot >= len(ranks):
            return -1, -1
        row_tiles = ceil_div(rows, sizes.rows)
        tile_ranks = sizes.vector_ranks if rows == 1 else sizes.ranks
        for module in range(ranks.shape[1]):
            rank_tiles = ceil_div(max(ranks[slot, module], 0), tile_ranks)
            strides[segment, module] = rank_tiles * tile_ranks
            if rows == 1:
                single_tiles += rank_tiles
            else:
                dot_tiles += rank_tiles * row_tiles
    return single_tiles, dot_tiles


@compiled(types.UniTuple(INT, 2)(INT, INT, SIZES), nogil=False)
def choose_splits(single_tiles: int, dot_tiles: int, sizes: PlanSizes) -> tuple[int, int]:
    """The splits of pairs of one row and of the others with which the grid is through first."""
    single_blocks = ceil_div(sizes.in_features, sizes.vector_columns)
    dot_blocks = ceil_div(sizes.in_features, sizes.span)
    most = max(single_blocks if single_tiles else 1, dot_blocks if dot_tiles else 1)
    best = least_time = 0
    for blocks in range(ceil_div(most, sizes.max_splits), most + 1):
        items = single_tiles * ceil_div(single_blocks, blocks) + dot_tiles * ceil_div(dot_blocks, blocks)
        time = grid_time(items, sizes.shrink_programs, blocks)
        if not best or time < least_time:
            best, least_time = blocks, time
    return ceil_div(single_blocks, best), ceil_div(dot_blocks, best)


@compiled(INT(INT_ROWS, PAIRS), nogil=False)
def place_pairs(segments: Words, pairs: Pairs) -> int:
    """Elements of all partials. Fills in the offsets."""
    offset = 0
    for segment in range(len(segments)):
        rows = segments[segment, 1] - segments[segment, 0]
        splits = pairs.single_splits if rows == 1 else pairs.dot_splits
        for module in range(pairs.strides.shape[1]):
            pairs.offsets[segment, module] = offset
            offset += splits * rows * pairs.strides[segment, module]
    return offset


@compiled(LONGS(INT, INT), nogil=False)
def _split_blocks(blocks: int, splits: int) -> Longs:
    """[splits]: first column block | blocks << 16. They differ by one block at most, and none is empty."""
    words = np.empty(splits, dtype=np.int64)
    for split in range(splits):
        first = split * blocks // splits
        words[split] = first | ((split + 1) * blocks // splits - first) << BLOCKS_SHIFT
    return words


@compiled(types.void(INT_ROWS, PAIRS, SIZES, INT_ROWS), nogil=False)
def write_shrink(segments: Words, pairs: Pairs, sizes: PlanSizes, items: Words) -> None:
    """Each pair's row tiles, in each its rank tiles, in each its splits."""
    single_blocks = _split_blocks(ceil_div(sizes.in_features, sizes.vector_columns), pairs.single_splits)
    dot_blocks = _split_blocks(ceil_div(sizes.in_features, sizes.span), pairs.dot_splits)
    item = 0
    for segment in range(len(segments)):
        start, slot = segments[segment, 0], segments[segment, 2]
        rows = segments[segment, 1] - start
        blocks = single_blocks if rows == 1 else dot_blocks
        tile_ranks = sizes.vector_ranks if rows == 1 else sizes.ranks
        for module in range(pairs.strides.shape[1]):
            stride, offset = pairs.strides[segment, module], pairs.offsets[segment, module]
            for row in range(0, rows if stride else 0, sizes.rows):
                tile_rows = 0 if rows == 1 else min(rows - row, sizes.rows)
                for rank_start in range(0, stride, tile_ranks):
                    for split in range(len(blocks)):
                        items[item, 0] = slot
                        items[item, 1] = module
                        items[item, 2] = rank_start
                        items[item, 3] = blocks[split]
                        items[item, 4] = stride
                        items[item, 5] = start + row
                        items[item, 6] = tile_rows
                        items[item, 7] = offset + (split * rows + row) * stride + rank_start
                        item += 1
