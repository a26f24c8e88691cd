"""The expand items of a LoRA plan: every group, cut into rows and columns. ``lora_plan`` has the words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from segue.compiled import INT, INT_ROWS, INTS, LONG_ROWS, LONGS, compiled, types
from segue.gpu_kernels.lora_plan import (
    BLOCKS_SHIFT,
    PAIRS,
    SIZES,
    TERM,
    TERM_WORDS,
    ExpandKind,
    Longs,
    Pairs,
    PlanSizes,
    Words,
    ceil_div,
    grid_time,
)

# As compiled code reads them.
_KINDS = len(ExpandKind)
_WIDE, _TALL, _ANY = int(ExpandKind.WIDE), int(ExpandKind.TALL), int(ExpandKind.ANY)
# Columns of a table of groups: first row, rows, tiles of rows, module, ExpandKind, largest rank, first term. Behind the
# last group the table has where its terms end.
_ROW, _ROWS, _ROW_TILES, _MODULE, _KIND, _RANK, FIRST_TERM = range(7)


class Cuts(NamedTuple):
    """The expand items of one row tile, of each kind and module: ``blocks`` has first column block | blocks << 16, and
    those of kind * modules + module begin at ``starts``, [kinds * modules + 1]."""

    blocks: Longs
    starts: Longs


CUTS = types.NamedUniTuple(LONGS, 2, Cuts)


@compiled(types.UniTuple(LONGS, 3)(INT_ROWS), nogil=False)
def _cover_ranges(segments: Words) -> tuple[Longs, Longs, Longs]:
    """Where the ranges begin and the last ends, [ranges + 1]; each range's segments, in their order; and where those of
    each range begin in these, [ranges + 1]."""
    bounds = segments[:, :2].copy().reshape(-1).astype(np.int64)
    for index in range(1, len(bounds)):
        if bounds[index] < bounds[index - 1]:
            bounds.sort()
            break
    count = 0
    for index in range(len(bounds)):
        if not index or bounds[index] != bounds[count - 1]:
            bounds[count] = bounds[index]
            count += 1
    starts = np.zeros(count + 2, dtype=np.int64)
    firsts = np.empty(len(segments), dtype=np.int64)
    at = 0
    for segment in range(len(segments)):
        # Most segments begin where the one before ends.
        while bounds[at] > segments[segment, 0]:
            at -= 1
        while bounds[at] < segments[segment, 0]:
            at += 1
        firsts[segment] = at
        while bounds[at] < segments[segment, 1]:
            starts[at + 2] += 1
            at += 1
    # While they are filled in, place r + 1 is where the next of range r goes.
    for index in range(2, len(starts)):
        starts[index] += starts[index - 1]
    covers = np.empty(starts[-1], dtype=np.int64)
    for segment in range(len(segments)):
        at = firsts[segment]
        while bounds[at] < segments[segment, 1]:
            covers[starts[at + 1]] = segment
            starts[at + 1] += 1
            at += 1
    return bounds[:count], covers, starts[: max(count, 1)]


@compiled(INT(INT, INT, SIZES), nogil=False)
def _group_kind(terms: int, rank: int, sizes: PlanSizes) -> int:
    """A group's ExpandKind; ``rank`` is the largest of its terms."""
    if terms > 1 or rank > sizes.tall_ranks:
        return _ANY
    return _WIDE if rank <= sizes.wide_ranks else _TALL


@compiled(types.Tuple((LONG_ROWS, INT_ROWS))(INT_ROWS, INTS, INT_ROWS, PAIRS, SIZES), nogil=False)
def make_groups(
    segments: Words, scale_bits: Words, ranks: Words, pairs: Pairs, sizes: PlanSizes
) -> tuple[Longs, Words]:
    """The table of groups, and the words of their terms, [terms, 6]."""
    bounds, covers, starts = _cover_ranges(segments)
    modules = ranks.shape[1]
    groups = np.empty(((len(starts) - 1) * modules + 1, 7), dtype=np.int64)
    terms = np.empty((len(covers) * modules, TERM_WORDS), dtype=np.int32)
    group = term = 0
    for part in range(len(starts) - 1):
        rows = bounds[part + 1] - bounds[part]
        row_tiles = ceil_div(rows, sizes.rows)
        for module in range(modules):
            rank, first_term = 0, term
            for cover in range(starts[part], starts[part + 1]):
                segment = covers[cover]
                stride = pairs.strides[segment, module]
                if stride:
                    start, slot = segments[segment, 0], segments[segment, 2]
                    pair_rows = segments[segment, 1] - start
                    rank = max(rank, ranks[slot, module])
                    terms[term, 0] = slot
                    terms[term, 1] = pairs.offsets[segment, module] + (bounds[part] - start) * stride
                    terms[term, 2] = stride
                    terms[term, 3] = pair_rows * stride
                    terms[term, 4] = pairs.single_splits if pair_rows == 1 else pairs.dot_splits
                    terms[term, 5] = scale_bits[segment]
                    term += 1
            if term > first_term:
                groups[group, _ROW], groups[group, _ROWS], groups[group, _ROW_TILES] = bounds[part], rows, row_tiles
                groups[group, _MODULE], groups[group, _RANK] = module, rank
                groups[group, _KIND] = _group_kind(term - first_term, rank, sizes)
                groups[group, FIRST_TERM] = first_term
                group += 1
    groups[group, FIRST_TERM] = term
    return groups[: group + 1], terms


@compiled(types.UniTuple(INT, 2)(INT, SIZES), nogil=False)
def _kind_columns(kind: int, sizes: PlanSizes) -> tuple[int, int]:
    """Columns of a block, and blocks of a chunk. An item may have several blocks, but never crosses a chunk."""
    columns = sizes.wide_columns if kind == _WIDE else sizes.tall_columns
    return columns, 1 if kind == _ANY else max(sizes.chunk_elems // columns, 1)


@compiled(INT(LONG_ROWS, SIZES, LONGS), nogil=False)
def choose_item_blocks(groups: Longs, sizes: PlanSizes, widths: Longs) -> int:
    """The column blocks of an expand item with which the grid is through first."""
    row_tiles = np.zeros((_KINDS, len(widths)), dtype=np.int64)
    for group in range(len(groups) - 1):
        row_tiles[groups[group, _KIND], groups[group, _MODULE]] += groups[group, _ROW_TILES]
    chunks = np.zeros(_KINDS, dtype=np.int64)
    most = 1
    for kind in range(_KINDS):
        columns, chunk_blocks = _kind_columns(kind, sizes)
        for module in range(len(widths)):
            chunks[kind] += row_tiles[kind, module] * ceil_div(ceil_div(widths[module], columns), chunk_blocks)
        if chunks[kind]:
            most = max(most, chunk_blocks)
    best = least_time = 0
    for blocks in range(1, most + 1):
        items = 0
        for kind in range(_KINDS):
            items += chunks[kind] * ceil_div(_kind_columns(kind, sizes)[1], blocks)
        time = grid_time(items, sizes.expand_programs, blocks)
        if not best or time < least_time:
            best, least_time = blocks, time
    return best


@compiled(CUTS(INT, SIZES, LONGS), nogil=False)
def cut_columns(item_blocks: int, sizes: PlanSizes, widths: Longs) -> Cuts:
    """Items of at most so many column blocks, about equally many of each chunk."""
    starts = np.zeros(_KINDS * len(widths) + 1, dtype=np.int64)
    most = 0
    for kind in range(_KINDS):
        columns, chunk_blocks = _kind_columns(kind, sizes)
        for module in range(len(widths)):
            most += ceil_div(ceil_div(widths[module], columns), chunk_blocks) * ceil_div(chunk_blocks, item_blocks)
    cuts = np.empty(most, dtype=np.int64)
    at = 0
    for kind in range(_KINDS):
        columns, chunk_blocks = _kind_columns(kind, sizes)
        pieces = ceil_div(chunk_blocks, item_blocks)
        for module in range(len(widths)):
            blocks = ceil_div(widths[module], columns)
            for chunk_start in range(0, blocks, chunk_blocks):
                for piece in range(pieces):
                    first = chunk_start + piece * chunk_blocks // pieces
                    stop = min(chunk_start + (piece + 1) * chunk_blocks // pieces, blocks)
                    if stop > first:
                        cuts[at] = first | (stop - first) << BLOCKS_SHIFT
                        at += 1
            starts[kind * len(widths) + module + 1] = at
    return Cuts(cuts[:at], starts)


@compiled(LONGS(LONG_ROWS, CUTS, INT), nogil=False)
def place_items(groups: Longs, cuts: Cuts, item_blocks: int) -> Longs:
    """Which item is the first of each size, rank * blocks, and at the end how many there are.

    Large items come first, so that programs that get one item more than others get a small one.
    """
    modules = (len(cuts.starts) - 1) // _KINDS
    largest = 0
    for group in range(len(groups) - 1):
        largest = max(largest, groups[group, _RANK] * item_blocks)
    places = np.zeros(largest + 2, dtype=np.int64)
    for group in range(len(groups) - 1):
        of_kind = groups[group, _KIND] * modules + groups[group, _MODULE]
        for cut in range(cuts.starts[of_kind], cuts.starts[of_kind + 1]):
            places[groups[group, _RANK] * (cuts.blocks[cut] >> BLOCKS_SHIFT)] += groups[group, _ROW_TILES]
    items = 0
    for size in range(largest, -1, -1):
        count = places[size]
        places[size] = items
        items += count
    places[largest + 1] = items
    return places


@compiled(types.void(LONG_ROWS, INT_ROWS, CUTS, SIZES, LONGS, LONGS, INT_ROWS), nogil=False)
def write_items(
    groups: Longs, terms: Words, cuts: Cuts, sizes: PlanSizes, widths: Longs, places: Longs, items: Words
) -> None:
    """The expand items, each to the place of its size."""
    out_starts = np.cumsum(widths) - widths
    for group in range(len(groups) - 1):
        kind, module, rank = groups[group, _KIND], groups[group, _MODULE], groups[group, _RANK]
        row, rows, first_term = groups[group, _ROW], groups[group, _ROWS], groups[group, FIRST_TERM]
        of_kind = kind * len(widths) + module
        for tile_row in range(0, rows, sizes.rows):
            for cut in range(cuts.starts[of_kind], cuts.starts[of_kind + 1]):
                blocks = cuts.blocks[cut]
                size = rank * (blocks >> BLOCKS_SHIFT)
                item = places[size]
                places[size] += 1
                items[item, 0] = kind
                items[item, 1] = module
                items[item, 2] = blocks
                items[item, 3] = row + tile_row
                items[item, 4] = min(rows - tile_row, sizes.rows)
                items[item, 5] = tile_row
                items[item, 6] = groups[group + 1, FIRST_TERM] - first_term
                items[item, 7] = first_term - group
                for word in range(TERM_WORDS):
                    items[item, TERM + word] = terms[first_term, word]
                items[item, 14] = out_starts[module]
                items[item, 15] = widths[module]


@compiled(types.void(LONG_ROWS, INT_ROWS, INT_ROWS), nogil=False)
def write_further(groups: Longs, terms: Words, further: Words) -> None:
    """The terms of each group but its first."""
    further[:] = 0
    at = 0
    for group in range(len(groups) - 1):
        for term in range(groups[group, FIRST_TERM] + 1, groups[group + 1, FIRST_TERM]):
            further[at, TERM : TERM + TERM_WORDS] = terms[term]
            at += 1
