"""What the kernels share: addresses of matrix rows that lie in pages, bounds of loops, and products of tiles."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def row_offsets(
    page_table: tl.tensor,
    start_chunk: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    row_chunks: tl.tensor,
    column: tl.tensor,
    block: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
) -> tl.tensor:
    """Element offsets into the pool, int64 [R, block], of columns ``column`` to ``column + block`` of ``rows`` [R].

    Pages are looked up once per (row, chunk), never per element. ``column`` is a multiple of ``block``.
    ``block`` and ``chunk_elems`` are powers of two, so that one divides the other. Masked rows read no table.
    """
    if block <= chunk_elems:
        chunk = start_chunk + rows * row_chunks + column // chunk_elems  # [R]
        page = tl.load(page_table + chunk // page_chunks, mask=row_mask, other=0).to(tl.int64)  # [R]
        start = (page * page_chunks + chunk % page_chunks) * chunk_elems + column % chunk_elems  # [R]
        offsets = start[:, None] + tl.arange(0, block)[None, :]  # [R, block]
    else:
        blocks: tl.constexpr = block // chunk_elems
        place = column // chunk_elems + tl.arange(0, blocks)[None, :]  # [1, blocks]
        chunk = start_chunk + rows[:, None] * row_chunks + place  # [R, blocks]
        known = row_mask[:, None] & (place < row_chunks)  # [R, blocks]
        page = tl.load(page_table + chunk // page_chunks, mask=known, other=0).to(tl.int64)  # [R, blocks]
        start = (page * page_chunks + chunk % page_chunks) * chunk_elems  # [R, blocks]
        offsets = start[:, :, None] + tl.arange(0, chunk_elems)[None, None, :]  # [R, blocks, chunk_elems]
        offsets = tl.reshape(offsets, [rows.shape[0], block])
    # Without these hints the compiler loads element by element: a page number may be anything.
    run: tl.constexpr = min(block, chunk_elems)
    return tl.max_contiguous(tl.multiple_of(offsets, [1, run]), [1, run])


@triton.jit
def loop_bound(value: tl.tensor, interpreted: tl.constexpr) -> tl.tensor:
    """``value`` as a bound of ``range``: numpy 2.4 and later refuse what the interpreter makes of a scalar."""
    if interpreted:
        return value.handle.data.item()
    return value


@triton.jit
def add_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, interpreted: tl.constexpr) -> tl.tensor:
    """``total + a b`` with float32 accumulation, exact for float32 (no TF32).

    Triton's interpreter keeps bfloat16 as integers and would multiply those.
    """
    if interpreted:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
