"""Dot products of a few rows with a few rows of weights: which tile computes them, by their element types."""

from __future__ import annotations

from typing import Any

from segue.compiled import FLOATS, HALVES, INT, compiled, types
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.tiles import (
    SUMS,
    TILE,
    dot_tiles_2x8,
    dot_tiles_2x8_bfloat16,
    dot_tiles_2x8_float16,
    dot_tiles_2x8_pairs,
    dot_tiles_4x4,
    dot_tiles_4x4_bfloat16,
    dot_tiles_4x4_float16,
    dot_tiles_4x4_pairs,
)

# How a tile multiplies: float32 rows with weights of an element type, or rows and weights as pairs of bfloat16.
FLOAT32, BFLOAT16 = int(ElementType.FLOAT32), int(ElementType.BFLOAT16)
PAIRS = 3
# Up to so many rows the weights are widened in the register, beyond before.
FEW_ROWS = TILE


@compiled(INT(INT, INT, INT))
def product_kind(x_element: int, w_element: int, rows: int) -> int:
    """How tiles multiply so many rows of one element type and weights of another."""
    if x_element == BFLOAT16 and w_element == BFLOAT16:
        return PAIRS
    return w_element if rows <= FEW_ROWS else FLOAT32


@compiled(INT(INT))
def tile_rows(rows: int) -> int:
    """Rows of the dot tile for so many: 2 or TILE. It takes SUMS over this rows of weights.

    Few rows wait for the weights' way from memory, which carries eight rows of them at once better than four.
    """
    return 2 if rows <= FEW_ROWS else TILE


@compiled(INT(INT))
def sums_stride(rank: int) -> int:
    """Elements between two rows of sums for ``rank`` rows of weights: every tile finds room."""
    return (rank + SUMS - 1) // SUMS * SUMS


@compiled(types.void(INT, INT, FLOATS, HALVES, INT, INT, INT, FLOATS, HALVES, INT, INT, INT, INT, FLOATS, INT, INT))
def dot(
    tile: int, kind: int, x: Any, x_halves: Any, x_at: int, x_stride: int, x_rows: int, w: Any, w_halves: Any,
    w_at: int, w_stride: int, w_rows: int, depth: int, out: Any, out_at: int, out_stride: int,
) -> None:  # fmt: skip
    """``out[i, j] += dot(x[i], w[j])`` by tiles of ``tile`` rows, with this kind of products: dot_tiles in tiles.py.

    Rows are read from ``x``, pairs from ``x_halves``; float32 weights from ``w``, others from ``w_halves``.
    """
    if kind == PAIRS:
        if tile == 2:
            dot_tiles_2x8_pairs(
                x_halves, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
            )
        else:
            dot_tiles_4x4_pairs(
                x_halves, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
            )
    elif kind == FLOAT32:
        if tile == 2:
            dot_tiles_2x8(x, x_at, x_stride, x_rows, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride)
        else:
            dot_tiles_4x4(x, x_at, x_stride, x_rows, w, w_at, w_stride, w_rows, depth, out, out_at, out_stride)
    elif kind == BFLOAT16:
        if tile == 2:
            dot_tiles_2x8_bfloat16(
                x, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
            )
        else:
            dot_tiles_4x4_bfloat16(
                x, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
            )
    elif tile == 2:
        dot_tiles_2x8_float16(
            x, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
        )
    else:
        dot_tiles_4x4_float16(
            x, x_at, x_stride, x_rows, w_halves, w_at, w_stride, w_rows, depth, out, out_at, out_stride
        )
