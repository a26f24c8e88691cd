"""LoRA over weights that lie in pages: ``out += scale * (x A^T) B^T``, row by row (Hu et al., 2021, arXiv:2106.09685).

This is the torch reference: the CPU device runs it, and it says what every kernel for another device means.

A matrix lies in the linear stream of elements that the pages of ``page_table`` form: element e is at page
``e // page_elems``, offset ``e % page_elems``. Each row starts at a multiple of ``chunk_elems`` and the rows stand
``row_stride`` elements apart, so an aligned chunk never crosses a page. Elements between rows are never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedModule:
    """A module of a LoRA point: A [rank, in] lies at element ``a_start``, B transposed [rank, width] at ``b_start``.

    Its delta, times ``scale``, belongs to ``width`` columns of the point's output from ``column`` on.
    """

    rank: int
    a_start: int
    b_start: int
    column: int
    width: int
    scale: float


def row_stride(columns: int, chunk_elems: int) -> int:
    """Elements from one row's start to the next: ``columns`` rounded up to whole chunks."""
    return -(-columns // chunk_elems) * chunk_elems


def read_rows(pool_layer: Tensor, page_table: Tensor, start: int, rows: int, columns: int, chunk_elems: int) -> Tensor:
    """A copy of the matrix at element ``start``: [rows, columns] in the pool's dtype.

    ``pool_layer`` is [pages, page_elems] and ``page_table`` [n] int64. Raises ValueError when the matrix is not aligned
    or ends behind the last page of the table.
    """
    stop = start + rows * row_stride(columns, chunk_elems)
    streams, first = _read_streams(pool_layer, page_table[None], start, stop, chunk_elems)
    return _matrices(streams, start - first, rows, columns, chunk_elems)[0]


def add_paged_lora(
    x: Tensor,
    out: Tensor,
    *,
    rows: slice | Tensor,
    pool_layer: Tensor,
    page_tables: Tensor,
    modules: Sequence[PagedModule],
    chunk_elems: int,
) -> None:
    """Add a LoRA point's deltas into ``out`` [tokens, merged out] in place, from x [tokens, in] of the pool's dtype.

    ``rows``, a slice or int64 indices, are those of one or more segments of equally many rows, one segment after the
    other. ``pool_layer`` is [pages, page_elems]; ``page_tables`` [segments, n] int64 has the pages of each segment's
    adapter, in all of which ``modules`` lie at the same elements. 16-bit dtypes are computed in float32: products,
    scale and the sum with ``out``, which is rounded once. Raises ValueError when a module is not aligned or ends behind
    the last page of the table.
    """
    segments, in_features = len(page_tables), x.shape[1]
    start = min(min(module.a_start, module.b_start) for module in modules)
    stop = max(_stop(module, in_features, chunk_elems) for module in modules)
    streams, first = _read_streams(pool_layer, page_tables, start, stop, chunk_elems)
    dtype = accumulator_dtype(out.dtype)
    # One copy of all that the modules need: a matrix at a time, dispatch would take longer than the products.
    streams, inputs, total = streams.to(dtype), x[rows].to(dtype), out[rows].to(dtype)
    inputs = inputs.view(segments, -1, in_features)
    merged = total.view(segments, -1, out.shape[1])
    for module in modules:
        a = _matrices(streams, module.a_start - first, module.rank, in_features, chunk_elems)
        b = _matrices(streams, module.b_start - first, module.rank, module.width, chunk_elems)
        target = merged[:, :, module.column : module.column + module.width]
        target.baddbmm_(torch.bmm(inputs, a.transpose(1, 2)), b, alpha=module.scale)
    out[rows] = total.to(out.dtype)


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
    pages = page_table.shape[-1]
    stop = -(-(start + elements) // page_elems)
    if start < 0 or stop > pages:
        raise ValueError(f"elements {start} to {start + elements} need {stop} pages, the table has {pages}")
    return start // page_elems, stop


def _read_streams(
    pool_layer: Tensor, page_tables: Tensor, start: int, stop: int, chunk_elems: int
) -> tuple[Tensor, int]:
    """A copy of the pages that hold elements ``start`` to ``stop`` of each of ``page_tables`` [segments, n].

    Returns it as [segments, elements], contiguous, with the number of its first element in the streams.
    """
    first, stop_page = covered_pages(pool_layer, page_tables, start, stop - start, chunk_elems)
    pages = pool_layer.index_select(0, page_tables[:, first:stop_page].reshape(-1))
    return pages.view(len(page_tables), -1), first * pool_layer.shape[1]


def _matrices(streams: Tensor, start: int, rows: int, columns: int, chunk_elems: int) -> Tensor:
    """The matrix at element ``start`` of each of ``streams`` [segments, elements]: a view [segments, rows, columns]."""
    stride = row_stride(columns, chunk_elems)
    return streams.as_strided((len(streams), rows, columns), (streams.shape[1], stride, 1), start)


def _stop(module: PagedModule, in_features: int, chunk_elems: int) -> int:
    """The element behind the module's last."""
    return max(
        module.a_start + module.rank * row_stride(in_features, chunk_elems),
        module.b_start + module.rank * row_stride(module.width, chunk_elems),
    )
