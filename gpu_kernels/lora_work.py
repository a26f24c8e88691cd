"""Plans of the LoRA kernels, made on the host once per composition of a batch: how large they get, and their making."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segue.compiled import FLOATS, INT, INT_ROWS, INTS, LONGS, compiled, types
from segue.gpu_kernels.lora_expand_plan import (
    FIRST_TERM,
    choose_item_blocks,
    cut_columns,
    make_groups,
    place_items,
    write_further,
    write_items,
)
from segue.gpu_kernels.lora_plan import (
    EXPAND_WORDS,
    HEADER_WORDS,
    SHRINK_WORDS,
    SIZES,
    Longs,
    Pairs,
    PlanSizes,
    Words,
    ceil_div,
)
from segue.gpu_kernels.lora_shrink_plan import choose_splits, measure_pairs, place_pairs, write_shrink
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape


class PlanCapacity(NamedTuple):
    """What a plan of a batch may need at most: int32 words, and float32 elements of workspace."""

    words: int
    workspace_elems: int


def plan_capacity(
    shape: PointShape, tiles: LoraTiles, *, max_segments: int, max_rows: int, max_rank: int
) -> PlanCapacity:
    """The largest plan of ``max_segments`` segments that together hold ``max_rows`` rows."""
    vector_ranks, vector_columns = tiles.vector
    single = min(max_segments, max_rows)
    row_tiles = max_rows // tiles.rows + min(max_segments, max_rows // 2)
    modules = shape.modules
    shrink = modules * (
        single * ceil_div(max_rank, vector_ranks) * min(ceil_div(shape.in_features, vector_columns), tiles.max_splits)
        + row_tiles * ceil_div(max_rank, tiles.ranks) * min(ceil_div(shape.in_features, tiles.span), tiles.max_splits)
    )
    narrowest = min(tiles.wide[1], tiles.tall[1])
    # A segment's two ends cut the rows into at most one more range each.
    expand_tiles = single + row_tiles + 2 * max_segments
    expand = expand_tiles * sum(ceil_div(width, narrowest) for width in shape.out_features)
    further = modules * max_rows
    padded = max(ceil_div(max_rank, width) * width for width in (vector_ranks, tiles.ranks))
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
    empty or names no slot, or the plan is larger than ``plan`` or the workspace; then nothing is written.
    """
    if ranks.shape[1] != shape.modules or len(segment_scales) != len(segments):
        raise ValueError(
            f"ranks {ranks.shape}, segment_scales {segment_scales.shape}: "
            f"need {shape.modules} modules and {len(segments)} scales"
        )
    sizes = PlanSizes.of(shape, tiles)
    widths = np.array(shape.out_features)
    used_elems, words = _write_plan(segments, segment_scales, ranks, sizes, widths, plan, workspace_elems)
    if used_elems < 0:
        raise ValueError(f"segments: need 0 <= row_start < row_stop and a slot below {len(ranks)}")
    if used_elems > workspace_elems:
        raise ValueError(f"workspace_elems: {used_elems} partials needed, there is room for {workspace_elems}")
    if words > len(plan):
        raise ValueError(f"plan: {words} words needed, there is room for {len(plan)}")
    return words


@compiled(types.UniTuple(INT, 2)(INT_ROWS, FLOATS, INT_ROWS, SIZES, LONGS, INTS, INT), nogil=False)
def _write_plan(
    segments: Words,
    scales: NDArray[np.float32],
    ranks: Words,
    sizes: PlanSizes,
    widths: Longs,
    plan: Words,
    workspace_elems: int,
) -> tuple[int, int]:
    """Partials and words that the plan takes; it is written if there is room. (-1, 0) where a segment is wrong."""
    strides = np.empty((len(segments), len(widths)), dtype=np.int64)
    single_tiles, dot_tiles = measure_pairs(segments, ranks, sizes, strides)
    if single_tiles < 0:
        return -1, 0
    single_splits, dot_splits = choose_splits(single_tiles, dot_tiles, sizes)
    pairs = Pairs(strides, np.empty_like(strides), single_splits, dot_splits)
    used_elems = place_pairs(segments, pairs)
    if used_elems > workspace_elems:
        return used_elems, 0
    shrink_items = single_tiles * single_splits + dot_tiles * dot_splits
    groups, terms = make_groups(segments, scales.view(np.int32), ranks, pairs, sizes)
    item_blocks = choose_item_blocks(groups, sizes, widths)
    cuts = cut_columns(item_blocks, sizes, widths)
    places = place_items(groups, cuts, item_blocks)
    # Every group has one term that is in its items.
    expand_items, further_terms = places[-1], groups[-1, FIRST_TERM] - (len(groups) - 1)
    expand_start = HEADER_WORDS + shrink_items * SHRINK_WORDS
    further_start = expand_start + expand_items * EXPAND_WORDS
    words = further_start + further_terms * EXPAND_WORDS
    if words > len(plan):
        return used_elems, words
    plan[:HEADER_WORDS] = 0
    plan[0], plan[1], plan[2], plan[3] = shrink_items, expand_items, expand_start, further_start
    write_shrink(segments, pairs, sizes, plan[HEADER_WORDS:expand_start].reshape(-1, SHRINK_WORDS))
    write_items(groups, terms, cuts, sizes, widths, places, plan[expand_start:further_start].reshape(-1, EXPAND_WORDS))
    write_further(groups, terms, plan[further_start:words].reshape(-1, EXPAND_WORDS))
    return used_elems, words
