"""What the words of a LoRA plan mean, and what those who write them share.

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

A pair is a segment and a module that its adapter targets. Rows are cut into ranges where a segment starts or ends; a
group is one range and one module, with a term for each pair that has these rows.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segue.compiled import INT, LONG_ROWS, compiled, types
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape

HEADER_WORDS = 16
SHRINK_WORDS = 8
EXPAND_WORDS = 16
BLOCKS_SHIFT = 16
# Where the words of an expand item's term lie.
TERM, TERM_WORDS = 8, 6

Longs = NDArray[np.int64]
Words = NDArray[np.int32]


class ExpandKind(IntEnum):
    """How an output tile is made.

    WIDE and TALL are rows of one segment, whose ranks fit one tile of few or of many ranks. ANY is rows of any number
    of segments and ranks.
    """

    WIDE = 0
    TALL = 1
    ANY = 2


class PlanSizes(NamedTuple):
    """What of a point's shape and tiles a plan depends on, besides the modules' widths."""

    in_features: int
    rows: int
    ranks: int
    span: int
    vector_ranks: int
    vector_columns: int
    wide_ranks: int
    wide_columns: int
    tall_ranks: int
    tall_columns: int
    chunk_elems: int
    max_splits: int
    shrink_programs: int
    expand_programs: int

    @classmethod
    def of(cls, shape: PointShape, tiles: LoraTiles) -> PlanSizes:
        """What compiled code is told of them."""
        return cls(
            shape.in_features,
            tiles.rows,
            tiles.ranks,
            tiles.span,
            *tiles.vector,
            *tiles.wide,
            *tiles.tall,
            tiles.chunk_elems,
            tiles.max_splits,
            tiles.shrink_programs,
            tiles.expand_programs,
        )


class Pairs(NamedTuple):
    """``strides`` [segments, modules] has each pair's partial row stride, 0 without a pair; ``offsets`` where its
    partials begin. The columns of a pair of one row are split into ``single_splits`` items, else ``dot_splits``."""

    strides: Longs
    offsets: Longs
    single_splits: int
    dot_splits: int


SIZES = types.NamedUniTuple(INT, len(PlanSizes._fields), PlanSizes)
PAIRS = types.NamedTuple((LONG_ROWS, LONG_ROWS, INT, INT), Pairs)


@compiled(INT(INT, INT), nogil=False)
def ceil_div(size: int, tile: int) -> int:
    """How many tiles a size takes."""
    return -(-size // tile)


@compiled(INT(INT, INT, INT), nogil=False)
def grid_time(items: int, programs: int, blocks: int) -> int:
    """How long a grid takes for so many items of ``blocks`` column blocks, in half blocks.

    Programs take one item after the other, and starting one takes as long as half a block.
    """
    return ceil_div(items, programs) * (2 * blocks + 1)
