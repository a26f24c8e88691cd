"""Expand: ``out += scale * s B^T`` for every output tile of a LoRA point, from the partials that shrink left.

The meaning is ``paged_lora.lora_expand_add``, with one rounding for all segments of a row. One item is one tile of the
output and loops over that tile's segments (its terms): no two programs write one output, and no data is added
atomically, so the same batch gives the same bits.
"""

from __future__ import annotations

import triton
from triton import language as tl
from triton.language.extra.cuda import gdc_wait

from segue.gpu_kernels.paged_rows import add_product, loop_bound, row_offsets


@triton.jit
def _expand_vector(
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
    ranks: tl.constexpr,
    columns: tl.constexpr,
    max_splits: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One row of one segment of at most ``ranks`` ranks, over the item's column blocks, without tensor cores.

    The first block's weights are on their way before shrink has ended.
    """
    module = tl.load(item + 1)
    blocks = tl.load(item + 2)
    slot = tl.load(item + 8)
    width = tl.multiple_of(tl.load(item + 15), out_align)
    entry = modules + slot * module_stride + module * 3
    rank = tl.load(entry)
    b_start = tl.load(entry + 2)
    page_table = page_tables + slot.to(tl.int64) * page_table_stride
    column = (blocks & 0xFFFF) * columns
    tile = tl.arange(0, ranks)  # [ranks]
    place = column + tl.arange(0, columns)  # [columns]
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    source = pool + row_offsets(
        page_table, b_start, tile, tile < rank, row_chunks, column, columns, chunk_elems, page_chunks
    )  # [ranks, columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + tl.multiple_of(tl.load(item + 14), out_align)
    b = tl.load(source, mask=(tile < rank)[:, None] & (place < width)[None, :], other=0.0)  # [ranks, columns]
    base = tl.load(target + place, mask=place < width, other=0.0)  # [columns]
    scale = tl.load(item + 13).to(tl.float32, bitcast=True) * tl.load(scales + slot * scale_stride + module)
    if dependent_launch:
        gdc_wait()
    split = tl.arange(0, max_splits)  # [max_splits]
    partial = partials + tl.load(item + 9) + split[:, None] * tl.load(item + 11) + tile[None, :]  # [max_splits, ranks]
    s = tl.load(partial, mask=(split < tl.load(item + 12))[:, None] & (tile < rank)[None, :], other=0.0)
    s = scale * tl.sum(s, axis=0)  # [ranks]
    total = tl.sum(b.to(tl.float32) * s[:, None], axis=0)  # [columns]
    tl.store(target + place, (base.to(tl.float32) + total).to(base.dtype), mask=place < width)
    for ahead in range(columns, loop_bound((blocks >> 16) * columns, interpreted), columns):
        place = column + ahead + tl.arange(0, columns)  # [columns]
        b = tl.load(source + ahead, mask=(tile < rank)[:, None] & (place < width)[None, :], other=0.0)
        base = tl.load(target + place, mask=place < width, other=0.0)  # [columns]
        total = tl.sum(b.to(tl.float32) * s[:, None], axis=0)  # [columns]
        tl.store(target + place, (base.to(tl.float32) + total).to(base.dtype), mask=place < width)


@triton.jit
def _expand_dot(
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
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Rows of one segment of at most ``ranks`` ranks, over the item's column blocks, through tensor cores."""
    module = tl.load(item + 1)
    blocks = tl.load(item + 2)
    rows = tl.load(item + 4)
    slot = tl.load(item + 8)
    # Rows of partials are whole rank tiles of shrink: at least 4 elements.
    partial_stride = tl.multiple_of(tl.load(item + 10), 4)
    split_stride = tl.multiple_of(tl.load(item + 11), 4)
    partial = partials + tl.multiple_of(tl.load(item + 9), 4) + tl.load(item + 5) * partial_stride
    splits = tl.load(item + 12)
    width = tl.multiple_of(tl.load(item + 15), out_align)
    entry = modules + slot * module_stride + module * 3
    rank = tl.load(entry)
    b_start = tl.load(entry + 2)
    scale = tl.load(item + 13).to(tl.float32, bitcast=True) * tl.load(scales + slot * scale_stride + module)
    page_table = page_tables + slot.to(tl.int64) * page_table_stride
    column = (blocks & 0xFFFF) * columns
    row = tl.arange(0, row_tile)  # [row_tile]
    tile = tl.arange(0, ranks)  # [ranks]
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    source = pool + row_offsets(
        page_table, b_start, tile, tile < rank, row_chunks, column, columns, chunk_elems, page_chunks
    )  # [ranks, columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + tl.multiple_of(tl.load(item + 14), out_align)
    target = target + row[:, None].to(tl.int64) * out_stride + tl.arange(0, columns)[None, :]  # [row_tile, columns]
    if dependent_launch:
        gdc_wait()
    summed = (row < rows)[:, None] & (tile < partial_stride)[None, :]  # [row_tile, ranks]
    read = partial + row[:, None] * partial_stride + tile[None, :]  # [row_tile, ranks]
    s = tl.zeros((row_tile, ranks), dtype=tl.float32)  # [row_tile, ranks]
    for split in range(loop_bound(splits, interpreted)):
        s += tl.load(read + split * split_stride, mask=summed, other=0.0)
    # Scaled before it is rounded: what a 16-bit dtype holds of the product stays in its range.
    left = (s * scale).to(pool.dtype.element_ty)  # [row_tile, ranks]
    for step in range(loop_bound(blocks >> 16, interpreted)):
        place = column + step * columns + tl.arange(0, columns)  # [columns]
        inside = (row < rows)[:, None] & (place < width)[None, :]  # [row_tile, columns]
        b = tl.load(source + step * columns, mask=(tile < rank)[:, None] & (place < width)[None, :], other=0.0)
        base = tl.load(target + column + step * columns, mask=inside, other=0.0)  # [row_tile, columns]
        total = add_product(left, b, base.to(tl.float32), interpreted)  # [row_tile, columns]
        tl.store(target + column + step * columns, total.to(base.dtype), mask=inside)


@triton.jit
def _expand_row(
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
    ranks: tl.constexpr,
    columns: tl.constexpr,
    max_splits: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One row with any segments and ranks, one column block, without tensor cores."""
    module = tl.load(item + 1)
    column = (tl.load(item + 2) & 0xFFFF) * columns
    width = tl.multiple_of(tl.load(item + 15), out_align)
    out_column = tl.multiple_of(tl.load(item + 14), out_align)
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    place = column + tl.arange(0, columns)  # [columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + out_column + place  # [columns]
    base = tl.load(target, mask=place < width, other=0.0)  # [columns]
    total = tl.zeros((columns,), dtype=tl.float32)  # [columns]
    terms = tl.load(item + 6)
    for number in range(loop_bound(terms, interpreted)):
        term = item
        if number > 0:
            term = further + (tl.load(item + 7) + number - 1) * 16
        slot = tl.load(term + 8)
        partial = partials + tl.load(term + 9) + tl.load(item + 5) * tl.load(term + 10)
        split_stride = tl.load(term + 11)
        splits = tl.load(term + 12)
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
            present = (tile < rank)[:, None] & (place < width)[None, :]
            b = tl.load(pool + offsets, mask=present, other=0.0)  # [ranks, columns]
            if dependent_launch:
                gdc_wait()
            split = tl.arange(0, max_splits)  # [max_splits]
            summed = (split < splits)[:, None] & (tile < rank)[None, :]
            s = tl.load(partial + split[:, None] * split_stride + tile[None, :], mask=summed, other=0.0)
            total += scale * tl.sum(b.to(tl.float32) * tl.sum(s, axis=0)[:, None], axis=0)
    tl.store(target, (base.to(tl.float32) + total).to(base.dtype), mask=place < width)


@triton.jit
def _expand_rows(
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
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Up to ``row_tile`` rows with any segments and ranks, one column block, through tensor cores."""
    module = tl.load(item + 1)
    column = (tl.load(item + 2) & 0xFFFF) * columns
    rows = tl.load(item + 4)
    width = tl.multiple_of(tl.load(item + 15), out_align)
    out_column = tl.multiple_of(tl.load(item + 14), out_align)
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    row = tl.arange(0, row_tile)  # [row_tile]
    place = column + tl.arange(0, columns)  # [columns]
    inside = (row < rows)[:, None] & (place < width)[None, :]  # [row_tile, columns]
    target = out + tl.load(item + 3).to(tl.int64) * out_stride + out_column
    target = target + row[:, None].to(tl.int64) * out_stride + place[None, :]  # [row_tile, columns]
    total = tl.zeros((row_tile, columns), dtype=tl.float32)  # [row_tile, columns]
    if dependent_launch:
        gdc_wait()
    terms = tl.load(item + 6)
    for number in range(loop_bound(terms, interpreted)):
        term = item
        if number > 0:
            term = further + (tl.load(item + 7) + number - 1) * 16
        slot = tl.load(term + 8)
        partial_stride = tl.load(term + 10)
        partial = partials + tl.load(term + 9) + tl.load(item + 5) * partial_stride
        split_stride = tl.load(term + 11)
        splits = tl.load(term + 12)
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
            summed = (row < rows)[:, None] & (tile < rank)[None, :]  # [row_tile, ranks]
            source = partial + row[:, None] * partial_stride + tile[None, :]  # [row_tile, ranks]
            s = tl.zeros((row_tile, ranks), dtype=tl.float32)  # [row_tile, ranks]
            for split in range(loop_bound(splits, interpreted)):
                s += tl.load(source + split * split_stride, mask=summed, other=0.0)
            # Scaled before it is rounded: what a 16-bit dtype holds of the product stays in its range.
            total = add_product((s * scale).to(b.dtype), b, total, interpreted)
    base = tl.load(target, mask=inside, other=0.0)  # [row_tile, columns]
    tl.store(target, (base.to(tl.float32) + total).to(base.dtype), mask=inside)


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
    ranks: tl.constexpr,
    columns: tl.constexpr,
    wide_ranks: tl.constexpr,
    wide_columns: tl.constexpr,
    tall_ranks: tl.constexpr,
    tall_columns: tl.constexpr,
    max_splits: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    dependent_launch: tl.constexpr,
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
            _expand_vector(
                item, partials, pool, page_tables, page_table_stride, modules, module_stride, scales, scale_stride, out,
                out_stride, out_align, wide_ranks, wide_columns, max_splits, chunk_elems, page_chunks, dependent_launch,
                interpreted,
            )  # fmt: skip
        elif kind == 1:
            _expand_vector(
                item, partials, pool, page_tables, page_table_stride, modules, module_stride, scales, scale_stride, out,
                out_stride, out_align, tall_ranks, tall_columns, max_splits, chunk_elems, page_chunks, dependent_launch,
                interpreted,
            )  # fmt: skip
        elif kind == 2:
            _expand_dot(
                item, partials, pool, page_tables, page_table_stride, modules, module_stride, scales, scale_stride, out,
                out_stride, out_align, row_tile, ranks, columns, chunk_elems, page_chunks, dependent_launch,
                interpreted,
            )  # fmt: skip
        elif kind == 3:
            _expand_row(
                item, further, partials, pool, page_tables, page_table_stride, modules, module_stride, scales,
                scale_stride, out, out_stride, out_align, tall_ranks, tall_columns, max_splits, chunk_elems,
                page_chunks, dependent_launch, interpreted,
            )  # fmt: skip
        else:
            _expand_rows(
                item, further, partials, pool, page_tables, page_table_stride, modules, module_stride, scales,
                scale_stride, out, out_stride, out_align, row_tile, ranks, columns, chunk_elems, page_chunks,
                dependent_launch, interpreted,
            )  # fmt: skip
