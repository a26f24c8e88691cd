"""LoRA over weights that lie in pages: ``out += scale * (x A^T) B^T``, row by row (Hu et al., 2021, arXiv:2106.09685).

This is the torch reference: the CPU device runs it, and every kernel for another device is tested against it.

A matrix lies in the linear stream of elements that the pages of ``page_table`` form: element e is at page
``e // page_elems``, offset ``e % page_elems``. Each row starts at a multiple of ``chunk_elems`` and the rows stand
``row_stride`` elements apart, so an aligned chunk never crosses a page. Elements between rows are never used.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_stride(columns: int, chunk_elems: int) -> int:
    """Elements from one row's start to the next: ``columns`` rounded up to whole chunks."""
    return -(-columns // chunk_elems) * chunk_elems


def read_rows(pool_layer: Tensor, page_table: Tensor, start: int, rows: int, columns: int, chunk_elems: int) -> Tensor:
    """A copy of the matrix at element ``start``: [rows, columns] in the pool's dtype.

    ``pool_layer`` is [pages, page_elems] and ``page_table`` [n] int64. Raises ValueError when the matrix is not aligned
    or ends behind the last page of the table.
    """
    stride = row_stride(columns, chunk_elems)
    first, stop = covered_pages(pool_layer, page_table, start, rows * stride, chunk_elems)
    page_elems = pool_layer.shape[1]
    stream = pool_layer.index_select(0, page_table[first:stop]).view(-1)
    begin = start - first * page_elems
    return stream[begin : begin + rows * stride].view(rows, stride)[:, :columns]


def lora_shrink(x: Tensor, pool_layer: Tensor, page_table: Tensor, a_start: int, rank: int, chunk_elems: int) -> Tensor:
    """``x A^T``: [tokens, in] times A [rank, in] of the pages gives [tokens, rank], float32 for 16-bit dtypes."""
    a = read_rows(pool_layer, page_table, a_start, rank, x.shape[1], chunk_elems)
    dtype = accumulator_dtype(x.dtype)
    return x.to(dtype) @ a.to(dtype).T


def lora_expand_add(
    s: Tensor, pool_layer: Tensor, page_table: Tensor, b_start: int, out: Tensor, scale: float, chunk_elems: int
) -> None:
    """``out += scale * s B^T`` in place: s [tokens, rank], B lies in the pages transposed, as [rank, out_features].

    ``out`` is [tokens, out_features]; it may be a slice of columns of a wider tensor. The sum is made in float32 and
    rounded once for 16-bit dtypes.
    """
    b = read_rows(pool_layer, page_table, b_start, s.shape[1], out.shape[1], chunk_elems)
    dtype = accumulator_dtype(out.dtype)
    if dtype == out.dtype:
        out.addmm_(s.to(dtype), b.to(dtype), alpha=scale)
    else:
        out.copy_(torch.addmm(out.to(dtype), s.to(dtype), b.to(dtype), alpha=scale))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over ``dtype`` are made in: float32 for 16-bit dtypes, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def covered_pages(
    pool_layer: Tensor, page_table: Tensor, start: int, elements: int, chunk_elems: int
) -> tuple[int, int]:
    """First and stop index into ``page_table`` of the pages that hold ``elements`` elements from ``start`` on.

    Raises ValueError when start or page size is not a multiple of ``chunk_elems``, or the table is too short.
    """
    page_elems = pool_layer.shape[1]
    if start % chunk_elems or page_elems % chunk_elems:
        raise ValueError(f"start {start} and page_elems {page_elems} must be multiples of chunk_elems {chunk_elems}")
    stop = -(-(start + elements) // page_elems)
    if start < 0 or stop > page_table.shape[0]:
        raise ValueError(f"elements {start} to {start + elements} need {stop} pages, the table has {len(page_table)}")
    return start // page_elems, stop
