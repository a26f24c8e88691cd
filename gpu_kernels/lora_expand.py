"""Expand: ``out += scale * s B^T`` for every output tile of a LoRA point, from the partials that shrink left.

The meaning is ``paged_lora.add_paged_lora``, with one rounding for all segments of a row. One item is one tile of the
output and loops over that tile's segments (its terms): no two programs write one output, and no data is added
atomically, so the same batch gives the same bits.
"""

from __future__ import annotations

import triton
from triton import language as tl
from triton.language.extra.cuda import gdc_wait

from segue.gpu_kernels.paged_rows import add_product, loop_bound, row_offsets


@triton.jit
def _sum_partials(
    partials: tl.tensor,
    term: tl.tensor,
    first_row: tl.tensor,
    rows: tl.tensor,
    rank_start: tl.tensor,
    row_tile: tl.constexpr,
    ranks: tl.constexpr,
    interpreted: tl.constexpr,
) -> tl.tensor:
    """[row_tile, ranks] of a term's ``x A^T``: its splits in their order. Zero behind the plan's rank and the rows."""
    # Rows of partials are whole rank tiles of shrink: at least 4 elements.
    stride = tl.multiple_of(tl.load(term + 10), 4)
    split_stride = tl.multiple_of(tl.load(term + 11), 4)
    row = tl.arange(0, row_tile)  # [row_tile]
    tile = rank_start + tl.arange(0, ranks)  # [ranks]
    known = (row < rows)[:, None] & (tile < stride)[None, :]  # [row_tile, ranks]
    source = partials + tl.multiple_of(tl.load(term + 9), 4) + (first_row + row[:, None]) * stride + tile[None, :]
    total = tl.zeros((row_tile, ranks), dtype=tl.float32)  # [row_tile, ranks]
    # Unrolled, so that several splits are on their way at once.
    for split in tl.range(0, loop_bound(tl.load(term + 12), interpreted), loop_unroll_factor=4):
        total += tl.load(source + split * split_stride, mask=known, other=0.0)
    return total


@triton.jit
def _expand_one(
    item: tl.tensor,
    partials: tl.tensor,
    pool: tl.tensor,
    page_tables: tl.tensor,
    page_table_stride: tl.tensor,
    modules: tl.tensor,
    module_stride: tl.tensor,
    scales: tl.tensor,
    scale_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    out_align: tl.constexpr,
    row_tile: tl.constexpr,
    ranks: tl.constexpr,
    columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    early_start: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Rows of one segment of at most ``ranks`` ranks, over the item's column blocks."""
    module = tl.load(item + 1)
    blocks = tl.load(item + 2)
    rows = tl.load(item + 4)
    slot = tl.load(item + 8)
    width = tl.multiple_of(tl.load(item + 15), out_align)
    entry = modules + slot * module_stride + module * 3
    rank = tl.load(entry)
    b_start = tl.load(entry + 2)
    page_table = page_tables + slot.to(tl.int64) * page_table_stride
    column = (blocks & 0xFFFF) * columns
    row = tl.arange(0, row_tile)  # [row_tile]
    tile = tl.arange(0, ranks)  # [ranks]
    place = column + tl.arange(0, columns)  # [columns]
    end = tl.minimum(width, column + (blocks >> 16) * columns)
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    source = pool + row_offsets(
        page_table, b_start, tile, tile < rank, row_chunks, column, columns, chunk_elems, page_chunks
    )  # [ranks, columns]
    b = tl.load(source, mask=(tile < rank)[:, None] & (place < width)[None, :], other=0.0)  # [ranks, columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + tl.multiple_of(tl.load(item + 14), out_align)
    target = target + row[:, None].to(tl.int64) * out_stride + place[None, :]  # [row_tile, columns]
    inside = (row < rows)[:, None] & (place < width)[None, :]  # [row_tile, columns]
    scale = tl.load(item + 13).to(tl.float32, bitcast=True) * tl.load(scales + slot * scale_stride + module)
    if early_start:
        gdc_wait()  # Partials and the base product are there from here on; weights were on their way before.
    base = tl.load(target, mask=inside, other=0.0)  # [row_tile, columns]
    s = _sum_partials(partials, item, tl.load(item + 5), rows, 0, row_tile, ranks, interpreted)
    # Scaled before it is rounded: what a 16-bit dtype holds of the product stays in its range.
    left = (s * scale).to(b.dtype)  # [row_tile, ranks]
    for done in range(0, loop_bound((blocks >> 16) * columns, interpreted), columns):
        # The next block's weights are on their way while this one is added.
        present = done + columns + place < end  # [columns]
        next_b = tl.load(source + done + columns, mask=(tile < rank)[:, None] & present[None, :], other=0.0)
        next_base = tl.load(target + done + columns, mask=(row < rows)[:, None] & present[None, :], other=0.0)
        total = add_product(left, b, base.to(tl.float32), interpreted)  # [row_tile, columns]
        inside = (row < rows)[:, None] & (done + place < width)[None, :]  # [row_tile, columns]
        tl.store(target + done, total.to(base.dtype), mask=inside)
        b = next_b
        base = next_base


@triton.jit
def _expand_any(
    item: tl.tensor,
    further: tl.tensor,
    partials: tl.tensor,
    pool: tl.tensor,
    page_tables: tl.tensor,
    page_table_stride: tl.tensor,
    modules: tl.tensor,
    module_stride: tl.tensor,
    scales: tl.tensor,
    scale_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    out_align: tl.constexpr,
    row_tile: tl.constexpr,
    ranks: tl.constexpr,
    columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    early_start: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Rows with any number of segments and ranks, over one column block."""
    module = tl.load(item + 1)
    column = (tl.load(item + 2) & 0xFFFF) * columns
    rows = tl.load(item + 4)
    width = tl.multiple_of(tl.load(item + 15), out_align)
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    row = tl.arange(0, row_tile)  # [row_tile]
    place = column + tl.arange(0, columns)  # [columns]
    inside = (row < rows)[:, None] & (place < width)[None, :]  # [row_tile, columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + tl.multiple_of(tl.load(item + 14), out_align)
    target = target + row[:, None].to(tl.int64) * out_stride + place[None, :]  # [row_tile, columns]
    if early_start:
        gdc_wait()
    base = tl.load(target, mask=inside, other=0.0)  # [row_tile, columns]
    total = base.to(tl.float32)  # [row_tile, columns]
    for number in range(loop_bound(tl.load(item + 6), interpreted)):
        term = item
        if number > 0:
            term = further + (tl.load(item + 7) + number - 1) * 16
        slot = tl.load(term + 8)
        entry = modules + slot * module_stride + module * 3
        rank = tl.load(entry)
        b_start = tl.load(entry + 2)
        scale = tl.load(term + 13).to(tl.float32, bitcast=True) * tl.load(scales + slot * scale_stride + module)
        page_table = page_tables + slot.to(tl.int64) * page_table_stride
        for rank_start in range(0, loop_bound(rank, interpreted), ranks):
            tile = rank_start + tl.arange(0, ranks)  # [ranks]
            offsets = row_offsets(
                page_table, b_start, tile, tile < rank, row_chunks, column, columns, chunk_elems, page_chunks
            )  # [ranks, columns]
            b = tl.load(pool + offsets, mask=(tile < rank)[:, None] & (place < width)[None, :], other=0.0)
            s = _sum_partials(partials, term, tl.load(item + 5), rows, rank_start, row_tile, ranks, interpreted)
            total = add_product((s * scale).to(b.dtype), b, total, interpreted)
    tl.store(target, total.to(base.dtype), mask=inside)


@triton.jit
def expand_kernel(
    plan: tl.tensor,
    partials: tl.tensor,
    pool: tl.tensor,
    page_tables: tl.tensor,
    page_table_stride: tl.tensor,
    modules: tl.tensor,
    module_stride: tl.tensor,
    scales: tl.tensor,
    scale_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    out_align: tl.constexpr,
    row_tile: tl.constexpr,
    wide_ranks: tl.constexpr,
    wide_columns: tl.constexpr,
    tall_ranks: tl.constexpr,
    tall_columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    early_start: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """A persistent grid over the expand items of ``plan``; arguments as in ``lora.add_lora``."""
    items = tl.load(plan + 1)
    first = plan + tl.load(plan + 2)
    further = plan + tl.load(plan + 3)
    for index in range(
        loop_bound(tl.program_id(0), interpreted),
        loop_bound(items, interpreted),
        loop_bound(tl.num_programs(0), interpreted),
    ):
        item = first + index * 16
        kind = tl.load(item)
        if kind == 0:
            _expand_one(
                item, partials, pool, page_tables, page_table_stride, modules, module_stride, scales, scale_stride, out,
                out_stride, out_align, row_tile, wide_ranks, wide_columns, chunk_elems, page_chunks, early_start,
                interpreted,
            )  # fmt: skip
        elif kind == 1:
            _expand_one(
                item, partials, pool, page_tables, page_table_stride, modules, module_stride, scales, scale_stride, out,
                out_stride, out_align, row_tile, tall_ranks, tall_columns, chunk_elems, page_chunks, early_start,
                interpreted,
            )  # fmt: skip
        else:
            _expand_any(
                item, further, partials, pool, page_tables, page_table_stride, modules, module_stride, scales,
                scale_stride, out, out_stride, out_align, row_tile, tall_ranks, tall_columns, chunk_elems, page_chunks,
                early_start, interpreted,
            )  # fmt: skip
    if early_start:
        # A program without items must not end before the launch that this one began under: the next would begin, too.
        gdc_wait()
