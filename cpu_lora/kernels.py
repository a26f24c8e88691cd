"""LoRA deltas on one core: ``y = scale * (x @ A^T) @ B^T``.

x is ``[rows, in_features]``, A ``[rank, in_features]``, B ``[out_features, rank]``, all row-major, A and B in a
checkpoint's order and read in place; y is a block of ``out_features`` columns of a wider row-major matrix. x and y
share one element type, A and B another; all arithmetic is float32, and y is rounded once. "LoRA: Low-Rank Adaptation of
Large Language Models", Hu et al. 2021, equation 3.

The weights are read once per ROW_TILE rows. 16-bit operands are widened block by block into scratch memory that stays
in the first and second level caches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segue.cpu_lora.convert import (
    bfloat16_to_float32,
    float16_to_float32,
    float32_to_bfloat16,
    float32_to_float16,
)
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.layout import MAX_RANK
from segue.cpu_lora.native import FLOATS, HALVES, INT, compiled, types
from segue.cpu_lora.tiles import LANES, TILE, dot_tile, outer_tile

ROW_TILE = 64
DEPTH_BLOCK = 1024
OUT_BLOCK = 256
# Rows of a widened block start this much apart more than their length, so that four rows miss each other in the cache.
_PADDING = 16
_OUTER_ROWS = LANES // 2

_FLOAT32, _BFLOAT16 = int(ElementType.FLOAT32), int(ElementType.BFLOAT16)


class Scratch(NamedTuple):
    """Working memory of one worker, flat float32."""

    x: npt.NDArray[np.float32]  # [ROW_TILE, DEPTH_BLOCK + padding]
    w: npt.NDArray[np.float32]  # [TILE, DEPTH_BLOCK + padding] or [OUT_BLOCK, rank + padding]
    s: npt.NDArray[np.float32]  # [ROW_TILE, rank up to a multiple of TILE]
    st: npt.NDArray[np.float32]  # [ROW_TILE / LANES, rank, LANES]
    y: npt.NDArray[np.float32]  # [LANES, OUT_BLOCK]

    @classmethod
    def allocate(cls) -> Scratch:
        """Scratch memory for every shape up to MAX_RANK, touched."""
        sizes = (
            ROW_TILE * (DEPTH_BLOCK + _PADDING),
            OUT_BLOCK * (MAX_RANK + _PADDING),
            ROW_TILE * MAX_RANK,
            ROW_TILE * MAX_RANK,
            LANES * OUT_BLOCK,
        )
        return cls(*(np.full(size, 0, np.float32) for size in sizes))


SCRATCH = types.NamedUniTuple(FLOATS, 5, Scratch)


def reference_delta(
    x: npt.NDArray[Any], a: npt.NDArray[Any], b: npt.NDArray[Any], scale: float
) -> npt.NDArray[np.float64]:
    """The meaning: float64 [rows, out_features] from x [rows, in], A [rank, in], B [out, rank]."""
    return scale * (x.astype(np.float64) @ a.astype(np.float64).T) @ b.astype(np.float64).T


@compiled(types.Tuple((FLOATS, INT, INT))(FLOATS, HALVES, INT, INT, INT, INT, INT, FLOATS))
def _as_float32(
    floats: Any, halves: Any, element: int, offset_bytes: int, stride: int, rows: int, columns: int, scratch: Any
) -> Any:
    """A [rows, columns] block as (float32 array, element offset, row stride): in place, or widened into scratch."""
    if element == _FLOAT32:
        return floats, offset_bytes // 4, stride
    width = columns + _PADDING
    for row in range(rows):
        begin = offset_bytes // 2 + row * stride
        source = halves[begin : begin + columns]
        target = scratch[row * width : row * width + columns]
        if element == _BFLOAT16:
            for column in range(columns):
                target[column] = bfloat16_to_float32(source[column])
        else:
            for column in range(columns):
                target[column] = float16_to_float32(source[column])
    return scratch, 0, width


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, INT, INT, types.float64, SCRATCH))
def _shrink(
    floats: Any,
    halves: Any,
    x_element: int,
    x_bytes: int,
    rows: int,
    depth: int,
    w_element: int,
    a_bytes: int,
    rank: int,
    scale: float,
    scratch: Any,
) -> None:
    """``s = scale * x @ A^T``, into scratch.s row-major and into scratch.st transposed per LANES rows."""
    x_item = 4 if x_element == _FLOAT32 else 2
    w_item = 4 if w_element == _FLOAT32 else 2
    width = (rank + TILE - 1) // TILE * TILE
    s, st, factor = scratch.s, scratch.st, np.float32(scale)
    s[: (rows + TILE - 1) // TILE * TILE * width] = np.float32(0)
    for k in range(0, depth, DEPTH_BLOCK):
        ks = min(DEPTH_BLOCK, depth - k)
        x, x_at, x_stride = _as_float32(floats, halves, x_element, x_bytes + k * x_item, depth, rows, ks, scratch.x)
        for r in range(0, rank, TILE):
            rs = min(TILE, rank - r)
            a_at = a_bytes + (r * depth + k) * w_item
            w, w_at, w_stride = _as_float32(floats, halves, w_element, a_at, depth, rs, ks, scratch.w)
            for t in range(0, rows, TILE):
                dot_tile(
                    x, x_at + t * x_stride, x_stride, rows - t, w, w_at, w_stride, rs, ks, s, t * width + r, width
                )  # [4, ks] x [4, ks] -> [4, 4]
    for t in range(rows):
        lane = (t // LANES) * rank * LANES + t % LANES
        for r in range(rank):
            scaled = factor * s[t * width + r]
            s[t * width + r] = scaled
            st[lane + r * LANES] = scaled


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, FLOATS))
def _store(
    floats: Any, halves: Any, element: int, offset_bytes: int, stride: int, rows: int, columns: int, block: Any
) -> None:
    """Write ``block`` [rows, OUT_BLOCK] to a [rows, columns] block of the deltas, rounded to their element type."""
    for row in range(rows):
        source = block[row * OUT_BLOCK : row * OUT_BLOCK + columns]
        if element == _FLOAT32:
            begin = offset_bytes // 4 + row * stride
            floats[begin : begin + columns] = source
            continue
        begin = offset_bytes // 2 + row * stride
        target = halves[begin : begin + columns]
        if element == _BFLOAT16:
            for column in range(columns):
                target[column] = float32_to_bfloat16(source[column])
        else:
            for column in range(columns):
                target[column] = float32_to_float16(source[column])


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, INT, INT, INT, SCRATCH))
def _expand(
    floats: Any,
    halves: Any,
    y_element: int,
    y_bytes: int,
    y_stride: int,
    rows: int,
    w_element: int,
    b_bytes: int,
    rank: int,
    out_features: int,
    scratch: Any,
) -> None:
    """``y = s @ B^T`` from what ``_shrink`` left in scratch."""
    y_item = 4 if y_element == _FLOAT32 else 2
    w_item = 4 if w_element == _FLOAT32 else 2
    width = (rank + TILE - 1) // TILE * TILE
    block = scratch.y
    for o in range(0, out_features, OUT_BLOCK):
        outs = min(OUT_BLOCK, out_features - o)
        b_at = b_bytes + o * rank * w_item
        w, w_at, w_stride = _as_float32(floats, halves, w_element, b_at, rank, outs, rank, scratch.w)
        for t in range(0, rows, LANES):
            ts = min(LANES, rows - t)
            if ts >= _OUTER_ROWS:
                for j in range(0, outs, LANES):
                    at = w_at + j * w_stride
                    outer_tile(scratch.st, t * rank, w, at, w_stride, outs - j, rank, block, j, OUT_BLOCK)
            else:
                block[: (ts + TILE - 1) // TILE * TILE * OUT_BLOCK] = np.float32(0)
                for j in range(0, outs, TILE):
                    at = w_at + j * w_stride
                    for i in range(0, ts, TILE):
                        s_at, y_at = (t + i) * width, i * OUT_BLOCK + j
                        dot_tile(
                            scratch.s, s_at, width, ts - i, w, at, w_stride, outs - j, rank, block, y_at, OUT_BLOCK
                        )  # [4, rank] x [4, rank] -> [4, 4]
            _store(floats, halves, y_element, y_bytes + (t * y_stride + o) * y_item, y_stride, ts, outs, block)


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT))
def fill_zeros(
    floats: Any, halves: Any, y_element: int, y_bytes: int, y_stride: int, rows: int, out_features: int
) -> None:
    """Zero a [rows, out_features] block of the deltas."""
    for row in range(rows):
        if y_element == _FLOAT32:
            begin = y_bytes // 4 + row * y_stride
            floats[begin : begin + out_features] = np.float32(0)
        else:
            begin = y_bytes // 2 + row * y_stride
            halves[begin : begin + out_features] = np.uint16(0)


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, INT, INT, INT, INT, INT, INT, types.float64, SCRATCH))
def lora_delta(
    floats: Any,
    halves: Any,
    x_element: int,
    x_bytes: int,
    y_bytes: int,
    y_stride: int,
    rows: int,
    in_features: int,
    out_features: int,
    w_element: int,
    rank: int,
    a_bytes: int,
    b_bytes: int,
    scale: float,
    scratch: Any,
) -> None:
    """Compute one block of deltas for at most ROW_TILE rows; rank at most MAX_RANK.

    ``floats`` and ``halves`` are float32 and uint16 views of the same memory; offsets are bytes into it. The element
    types are ElementType's numbers; those of x and y are the same.
    """
    if rank == 0:
        fill_zeros(floats, halves, x_element, y_bytes, y_stride, rows, out_features)
        return
    _shrink(floats, halves, x_element, x_bytes, rows, in_features, w_element, a_bytes, rank, scale, scratch)
    _expand(floats, halves, x_element, y_bytes, y_stride, rows, w_element, b_bytes, rank, out_features, scratch)


def delta_of(
    x: npt.NDArray[Any], a: npt.NDArray[Any], b: npt.NDArray[Any], scale: float, scratch: Scratch | None = None
) -> npt.NDArray[Any]:
    """``lora_delta`` on plain arrays: x [rows, in], A [rank, in], B [out, rank] -> [rows, out].

    x is float32, float16 or uint16 (bfloat16 bits), A and B alike; the result has the type of x. Its
    memory holds NaN before, so what is not computed shows.
    """
    scratch = scratch or Scratch.allocate()
    x_type, w_type = ElementType.of(x.dtype), ElementType.of(a.dtype)
    (rows, in_features), (out_features, rank) = x.shape, b.shape
    offsets, end = [], 0
    # Bytes of ones are NaN in all three formats.
    y = np.full((rows, out_features), -1, np.int8).repeat(x_type.item_bytes, axis=1).view(x.dtype)
    for array in (x, a, b, y):
        offsets.append(end)
        end += -(-array.nbytes // 64) * 64
    memory = np.zeros(end, np.uint8)
    for array, offset in zip((x, a, b, y), offsets, strict=True):
        memory[offset : offset + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    floats, halves = memory.view(np.float32), memory.view(np.uint16)
    for t in range(0, rows, ROW_TILE):
        lora_delta(
            floats, halves, int(x_type), offsets[0] + t * in_features * x_type.item_bytes,
            offsets[3] + t * out_features * x_type.item_bytes, out_features, min(ROW_TILE, rows - t), in_features,
            out_features, int(w_type), rank, offsets[1], offsets[2], scale, scratch,
        )  # fmt: skip
    return memory[offsets[3] : offsets[3] + y.nbytes].view(x.dtype).reshape(y.shape)
