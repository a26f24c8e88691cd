"""Shrink: ``x A^T`` of every segment and module of a LoRA point, as float32 partials over blocks of columns.

The meaning is the first product of ``paged_lora.add_paged_lora``; the work list is that of ``lora_plan``. One item is a
rank tile of one segment and module over some blocks of columns, so time follows the bytes of the adapters that are
present.
"""

from __future__ import annotations

import triton
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from segue.gpu_kernels.paged_rows import add_product, loop_bound, row_offsets


@triton.jit
def _shrink_row(
    x: tl.tensor,
    pool: tl.tensor,
    page_table: tl.tensor,
    a_start: tl.tensor,
    rank: tl.tensor,
    rank_start: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    partials: tl.tensor,
    in_features: tl.constexpr,
    ranks: tl.constexpr,
    columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    vector_stages: tl.constexpr,
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """One row of x at ``x`` times a tile of A, without tensor cores."""
    row_chunks: tl.constexpr = (in_features + chunk_elems - 1) // chunk_elems
    tile = rank_start + tl.arange(0, ranks)  # [ranks]
    total = tl.zeros((ranks,), dtype=tl.float32)  # [ranks]
    for block in tl.range(
        loop_bound(first, interpreted), loop_bound(first + count, interpreted), num_stages=vector_stages
    ):
        column = block * columns
        offsets = row_offsets(
            page_table, a_start, tile, tile < rank, row_chunks, column, columns, chunk_elems, page_chunks
        )  # [ranks, columns]
        place = column + tl.arange(0, columns)  # [columns]
        present = (tile < rank)[:, None] & (place < in_features)[None, :]
        a = tl.load(pool + offsets, mask=present, other=0.0)  # [ranks, columns]
        if dependent_launch:
            gdc_wait()  # x is there from here on; weights were on their way before.
        value = tl.load(x + place, mask=place < in_features, other=0.0)  # [columns]
        total += tl.sum(a.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
    tl.store(partials + tl.arange(0, ranks), total)


@triton.jit
def _shrink_rows(
    x: tl.tensor,
    x_stride: tl.tensor,
    rows: tl.tensor,
    pool: tl.tensor,
    page_table: tl.tensor,
    a_start: tl.tensor,
    rank: tl.tensor,
    rank_start: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    partials: tl.tensor,
    partial_stride: tl.tensor,
    in_features: tl.constexpr,
    row_tile: tl.constexpr,
    ranks: tl.constexpr,
    span: tl.constexpr,
    step: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    stages: tl.constexpr,
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """``rows`` rows of x from ``x`` on times a tile of A, through tensor cores."""
    row_chunks: tl.constexpr = (in_features + chunk_elems - 1) // chunk_elems
    row = tl.arange(0, row_tile)  # [row_tile]
    tile = rank_start + tl.arange(0, ranks)  # [ranks]
    total = tl.zeros((row_tile, ranks), dtype=tl.float32)  # [row_tile, ranks]
    if dependent_launch:
        gdc_wait()
    for block in range(loop_bound(first, interpreted), loop_bound(first + count, interpreted)):
        column = block * span
        offsets = row_offsets(
            page_table, a_start, tile, tile < rank, row_chunks, column, step, chunk_elems, page_chunks
        )  # [ranks, step]
        a_tile = pool + offsets
        x_tile = x + row[:, None].to(tl.int64) * x_stride + (column + tl.arange(0, step))[None, :]  # [row_tile, step]
        for inner in tl.range(0, span, step, num_stages=stages):
            present = column + inner + tl.arange(0, step) < in_features  # [step]
            values = tl.load(x_tile + inner, mask=(row < rows)[:, None] & present[None, :], other=0.0)
            a = tl.load(a_tile + inner, mask=(tile < rank)[:, None] & present[None, :], other=0.0)  # [ranks, step]
            total = add_product(values, tl.trans(a), total, interpreted)
    target = partials + row[:, None] * partial_stride + tl.arange(0, ranks)[None, :]  # [row_tile, ranks]
    tl.store(target, total, mask=(row < rows)[:, None])


@triton.jit
def shrink_kernel(
    plan: tl.tensor,
    partials: tl.tensor,
    x: tl.tensor,
    x_stride: tl.tensor,
    pool: tl.tensor,
    page_tables: tl.tensor,
    page_table_stride: tl.tensor,
    modules: tl.tensor,
    module_stride: tl.tensor,
    in_features: tl.constexpr,
    row_tile: tl.constexpr,
    ranks: tl.constexpr,
    span: tl.constexpr,
    step: tl.constexpr,
    vector_ranks: tl.constexpr,
    vector_columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    stages: tl.constexpr,
    vector_stages: tl.constexpr,
    interpreted: tl.constexpr,
    header_words: tl.constexpr,
    item_words: tl.constexpr,
    dependent_launch: tl.constexpr,
) -> None:
    """A persistent grid over the shrink items of ``plan``; arguments as in ``lora.add_lora``."""
    if dependent_launch:
        gdc_launch_dependents()
    items = tl.load(plan)
    for index in range(
        loop_bound(tl.program_id(0), interpreted),
        loop_bound(items, interpreted),
        loop_bound(tl.num_programs(0), interpreted),
    ):
        item = plan + header_words + index * item_words
        slot = tl.load(item)
        module = tl.load(item + 1)
        rank_start = tl.load(item + 2)
        blocks = tl.load(item + 3)
        partial_stride = tl.load(item + 4)
        row_start = tl.load(item + 5)
        rows = tl.load(item + 6)
        target = partials + tl.load(item + 7)
        entry = modules + slot * module_stride + module * 3
        rank = tl.load(entry)
        a_start = tl.load(entry + 1)
        page_table = page_tables + slot.to(tl.int64) * page_table_stride
        x_rows = x + row_start.to(tl.int64) * x_stride
        if rows == 0:
            _shrink_row(
                x_rows, pool, page_table, a_start, rank, rank_start, blocks & 0xFFFF, blocks >> 16, target,
                in_features, vector_ranks, vector_columns, chunk_elems, page_chunks, vector_stages, dependent_launch,
                interpreted,
            )  # fmt: skip
        else:
            _shrink_rows(
                x_rows, x_stride, rows, pool, page_table, a_start, rank, rank_start, blocks & 0xFFFF, blocks >> 16,
                target, partial_stride, in_features, row_tile, ranks, span, step, chunk_elems, page_chunks, stages,
                dependent_launch, interpreted,
            )  # fmt: skip
    if dependent_launch:
        # A program without items must not end before the launch that this one began under: the next would begin, too.
        gdc_wait()
