"""LoRA deltas on one core: ``y = scale * (x @ A^T) @ B^T``.

x is ``[rows, in_features]``, A ``[rank, in_features]``, B ``[out_features, rank]``, all row-major, A and B in a
checkpoint's order and read in place; y is a block of ``out_features`` columns of a wider row-major matrix. x and y
share one element type, A and B another; sums are float32, and y is rounded once. "LoRA: Low-Rank Adaptation of Large
Language Models", Hu et al. 2021, equation 3.

Where x, A and B all are bfloat16, their products are taken in pairs in place, and ``scale * (x @ A^T)`` is rounded to
bfloat16 in between, as the GPU's kernels do it. In all other cases arithmetic is float32, and 16-bit operands are
widened: the weights of up to FEW_ROWS rows in the register, others block by block into scratch memory that stays in the
first and second level caches. The weights are read once per ROW_TILE rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from segue.compiled import FLOATS, HALVES, INT, compiled, types
from segue.cpu_lora.convert import (
    bfloat16_to_float32,
    float16_to_float32,
    float32_to_bfloat16,
    float32_to_float16,
)
from segue.cpu_lora.dots import BFLOAT16, FEW_ROWS, FLOAT32, PAIRS, dot, product_kind, sums_stride, tile_rows
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.layout import MAX_RANK
from segue.cpu_lora.tiles import TILE, outer_tile, outer_tile_pairs
from segue.cpu_lora.vectors import LANES

ROW_TILE = 64
DEPTH_BLOCK = 1024
OUT_BLOCK = 256
# Rows of a widened block start this much apart more than their length, so that four rows miss each other in the cache.
_PADDING = 16
# Outer tiles do not widen weights in the register: more rows than have that done.
_OUTER_ROWS = max(LANES // 2, FEW_ROWS + 1)


class Scratch(NamedTuple):
    """Working memory of one worker, flat: float32, and uint16 for bits of bfloat16."""

    x: npt.NDArray[np.float32]  # [ROW_TILE, DEPTH_BLOCK + padding]
    w: npt.NDArray[np.float32]  # [TILE, DEPTH_BLOCK + padding] or [OUT_BLOCK, rank + padding]
    s: npt.NDArray[np.float32]  # [ROW_TILE, rank up to a multiple of SUMS]
    st: npt.NDArray[np.float32]  # [ROW_TILE / LANES, rank, LANES]
    p: npt.NDArray[np.uint16]  # s, rounded
    pt: npt.NDArray[np.uint16]  # [ROW_TILE / LANES, rank up to a multiple of 2, LANES] by pairs of ranks, rounded
    y: npt.NDArray[np.float32]  # [LANES, OUT_BLOCK]

    @classmethod
    def allocate(cls) -> Scratch:
        """Scratch memory for every shape up to MAX_RANK, touched."""
        widened = (ROW_TILE * (DEPTH_BLOCK + _PADDING), OUT_BLOCK * (MAX_RANK + _PADDING))
        sums = ROW_TILE * MAX_RANK
        x, w, s, st, y = (np.full(size, 0, np.float32) for size in (*widened, sums, sums, LANES * OUT_BLOCK))
        p, pt = (np.full(sums, 0, np.uint16) for _ in range(2))
        return cls(x=x, w=w, s=s, st=st, p=p, pt=pt, y=y)


SCRATCH = types.NamedTuple((FLOATS, FLOATS, FLOATS, FLOATS, HALVES, HALVES, FLOATS), Scratch)


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
    if element == FLOAT32:
        return floats, offset_bytes // 4, stride
    width = columns + _PADDING
    for row in range(rows):
        begin = offset_bytes // 2 + row * stride
        source = halves[begin : begin + columns]
        target = scratch[row * width : row * width + columns]
        if element == BFLOAT16:
            for column in range(columns):
                target[column] = bfloat16_to_float32(source[column])
        else:
            for column in range(columns):
                target[column] = float16_to_float32(source[column])
    return scratch, 0, width


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, INT, INT, SCRATCH))
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
    scratch: Any,
) -> None:
    """``s = x @ A^T`` into scratch.s, row-major."""
    x_item = 4 if x_element == FLOAT32 else 2
    w_item = 4 if w_element == FLOAT32 else 2
    width, kind, tile = sums_stride(rank), product_kind(x_element, w_element, rows), tile_rows(rows)
    s = scratch.s
    # Widened weights are few, so that they stay in the cache.
    step = TILE if kind == FLOAT32 and w_element != FLOAT32 else rank
    s[: (rows + tile - 1) // tile * tile * width] = np.float32(0)
    # Pairs are never widened: a whole row is one block, whose sums are taken once.
    block = depth if kind == PAIRS else DEPTH_BLOCK
    for k in range(0, depth, block):
        ks = min(block, depth - k)
        x, x_at, x_stride = floats, x_bytes // 2, depth
        if kind != PAIRS:
            x, x_at, x_stride = _as_float32(floats, halves, x_element, x_bytes + k * x_item, depth, rows, ks, scratch.x)
        for r in range(0, rank, step):
            rs = min(step, rank - r)
            a_at = a_bytes + (r * depth + k) * w_item
            w, w_at, w_stride = floats, a_at // w_item, depth
            if kind == FLOAT32:
                w, w_at, w_stride = _as_float32(floats, halves, w_element, a_at, depth, rs, ks, scratch.w)
            dot(
                tile, kind, x, halves, x_at, x_stride, rows, w, halves, w_at, w_stride, rs, ks, s, r, width
            )  # [rows, ks] x [step, ks] -> [rows, step]  # fmt: skip


@compiled(types.void(INT, INT, types.float64, SCRATCH))
def _scale(rows: int, rank: int, scale: float, scratch: Any) -> None:
    """Multiply scratch.s, and transpose it into scratch.st per LANES rows."""
    width, factor, s = sums_stride(rank), np.float32(scale), scratch.s
    for t in range(rows):
        lane = (t // LANES) * rank * LANES + t % LANES
        for r in range(rank):
            scaled = factor * s[t * width + r]
            s[t * width + r] = scaled
            scratch.st[lane + r * LANES] = scaled


@compiled(types.void(INT, INT, types.float64, SCRATCH))
def _scale_pairs(rows: int, rank: int, scale: float, scratch: Any) -> None:
    """Multiply scratch.s and round it into scratch.p and, transposed by pairs of ranks, into scratch.pt."""
    width, factor = sums_stride(rank), np.float32(scale)
    even = (rank + 1) // 2 * 2
    for t in range(rows):
        row = scratch.p[t * width : t * width + even]
        for r in range(rank):
            row[r] = float32_to_bfloat16(factor * scratch.s[t * width + r])
        if even > rank:
            row[rank] = np.uint16(0)
        lane = (t // LANES) * even * LANES + 2 * (t % LANES)
        for r in range(0, even, 2):
            scratch.pt[lane + r * LANES] = row[r]
            scratch.pt[lane + r * LANES + 1] = row[r + 1]


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT, FLOATS))
def _store(
    floats: Any, halves: Any, element: int, offset_bytes: int, stride: int, rows: int, columns: int, block: Any
) -> None:
    """Write ``block`` [rows, OUT_BLOCK] to a [rows, columns] block of the deltas, rounded to their element type."""
    for row in range(rows):
        source = block[row * OUT_BLOCK : row * OUT_BLOCK + columns]
        if element == FLOAT32:
            begin = offset_bytes // 4 + row * stride
            floats[begin : begin + columns] = source
            continue
        begin = offset_bytes // 2 + row * stride
        target = halves[begin : begin + columns]
        if element == BFLOAT16:
            for column in range(columns):
                target[column] = float32_to_bfloat16(source[column])
        else:
            for column in range(columns):
                target[column] = float32_to_float16(source[column])


@compiled(types.void(INT, INT, FLOATS, HALVES, INT, INT, INT, INT, SCRATCH))
def _expand_outer(
    kind: int, t: int, w: Any, w_halves: Any, w_at: int, w_stride: int, outs: int, rank: int, scratch: Any
) -> None:
    """scratch.y = LANES rows of s from row t on, by ``outs`` rows of B; kind is FLOAT32 or PAIRS."""
    even = (rank + 1) // 2 * 2
    for j in range(0, outs, LANES):
        at = w_at + j * w_stride
        if kind == PAIRS:
            outer_tile_pairs(scratch.pt, t * even, w_halves, at, w_stride, outs - j, rank, scratch.y, j, OUT_BLOCK)
        else:
            outer_tile(scratch.st, t * rank, w, at, w_stride, outs - j, rank, scratch.y, j, OUT_BLOCK)


@compiled(INT(INT, INT))
def _outer_rows(kind: int, rank: int) -> int:
    """From how many rows on outer tiles are faster: at once for ranks that do not fill a dot tile's vectors."""
    if (kind == FLOAT32 and rank < LANES) or (kind == PAIRS and rank < 2 * LANES):
        return 1
    return _OUTER_ROWS


@compiled(types.void(INT, INT, INT, FLOATS, HALVES, INT, INT, INT, INT, SCRATCH))
def _expand_dot(
    kind: int, t: int, ts: int, w: Any, w_halves: Any, w_at: int, w_stride: int, outs: int, rank: int, scratch: Any
) -> None:
    """scratch.y = ``ts`` rows of s from row t on, by ``outs`` rows of B."""
    width, tile = sums_stride(rank), tile_rows(ts)
    scratch.y[: (ts + tile - 1) // tile * tile * OUT_BLOCK] = np.float32(0)
    dot(
        tile, kind, scratch.s, scratch.p, t * width, width, ts, w, w_halves, w_at, w_stride, outs, rank, scratch.y, 0,
        OUT_BLOCK,
    )  # [ts, rank] x [outs, rank] -> [ts, outs]  # fmt: skip


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
    """``y = s @ B^T`` from what scaling left in scratch."""
    y_item = 4 if y_element == FLOAT32 else 2
    w_item = 4 if w_element == FLOAT32 else 2
    kind = product_kind(y_element, w_element, rows)
    outer = _outer_rows(kind, rank)
    for o in range(0, out_features, OUT_BLOCK):
        outs = min(OUT_BLOCK, out_features - o)
        b_at = b_bytes + o * rank * w_item
        w, w_at, w_stride = floats, b_at // w_item, rank
        if kind == FLOAT32:
            w, w_at, w_stride = _as_float32(floats, halves, w_element, b_at, rank, outs, rank, scratch.w)
        for t in range(0, rows, LANES):
            ts = min(LANES, rows - t)
            if ts >= outer:
                _expand_outer(kind, t, w, halves, w_at, w_stride, outs, rank, scratch)
            else:
                _expand_dot(kind, t, ts, w, halves, w_at, w_stride, outs, rank, scratch)
            at = y_bytes + (t * y_stride + o) * y_item
            _store(floats, halves, y_element, at, y_stride, ts, outs, scratch.y)


@compiled(types.void(FLOATS, HALVES, INT, INT, INT, INT, INT))
def fill_zeros(
    floats: Any, halves: Any, y_element: int, y_bytes: int, y_stride: int, rows: int, out_features: int
) -> None:
    """Zero a [rows, out_features] block of the deltas."""
    for row in range(rows):
        if y_element == FLOAT32:
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
    _shrink(floats, halves, x_element, x_bytes, rows, in_features, w_element, a_bytes, rank, scratch)
    if product_kind(x_element, w_element, rows) == PAIRS:
        _scale_pairs(rows, rank, scale, scratch)
    else:
        _scale(rows, rank, scale, scratch)
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
