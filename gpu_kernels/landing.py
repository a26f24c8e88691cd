"""Landing: writing an adapter's matrices into pages, in the layout that ``paged_lora`` reads.

This is the torch reference: the CPU device runs it, and it says what ``land_layers`` means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segue.gpu_kernels.paged_lora import covered_pages, row_stride

# Words of a module's row in a landing table: source of A, source of B, rank, in_features, out_features, first chunk of
# A, first chunk of B, layer. Sources are elements from the beginning of the adapter's host copy.
LANDING_WORDS = 8


def land_matrices(
    staging: Tensor, first_elem: int, table: Tensor, pool: Tensor, page_table: Tensor, chunk_elems: int
) -> None:
    """Write layers of an adapter into its pages, A as it is and B transposed, for every module.

    ``staging`` [elements] of the pool's dtype holds a part of the adapter in checkpoint order, from element
    ``first_elem`` on: A [rank, in_features] and B [out_features, rank] of each module. ``table`` is int64
    [modules, LANDING_WORDS]. ``pool`` is [layers, pages, page_elems], contiguous, and ``page_table`` int64 [n]. Only
    the matrices' own elements are written. Raises ValueError when a matrix ends behind the table.
    """
    for a, b, rank, in_features, out_features, a_chunk, b_chunk, layer in table.tolist():
        for source, rows, columns, chunk, transpose in (
            (a - first_elem, rank, in_features, a_chunk, False),
            (b - first_elem, out_features, rank, b_chunk, True),
        ):
            matrix = staging[source : source + rows * columns].view(rows, columns)
            land_rows(matrix, pool[layer], page_table, chunk * chunk_elems, chunk_elems, transpose=transpose)


def land_rows(
    source: Tensor, pool_layer: Tensor, page_table: Tensor, start: int, chunk_elems: int, *, transpose: bool = False
) -> None:
    """Write one matrix into the pages, its first row at element ``start``.

    ``source`` is [rows, columns] (with ``transpose``: [columns, rows]) of the pool's dtype, ``pool_layer`` is
    [pages, page_elems], contiguous, and ``page_table`` [n] int64. Only the matrix's own elements are written. Raises
    ValueError when the place is not aligned or ends behind the table.
    """
    matrix = source.T if transpose else source
    rows, columns = matrix.shape
    stride = row_stride(columns, chunk_elems)
    covered_pages(pool_layer, page_table, start, rows * stride, chunk_elems)

    chunks_per_page = pool_layer.shape[1] // chunk_elems
    chunks = pool_layer.view(-1, chunk_elems)
    first = start // chunk_elems
    stream = torch.arange(first, first + rows * stride // chunk_elems, device=page_table.device)
    target = page_table[stream // chunks_per_page] * chunks_per_page + stream % chunks_per_page
    target = target.view(rows, stride // chunk_elems)

    whole = columns // chunk_elems
    if whole:
        chunks[target[:, :whole]] = matrix[:, : whole * chunk_elems].reshape(rows, whole, chunk_elems)
    rest = columns - whole * chunk_elems
    if rest:
        chunks[target[:, whole], :rest] = matrix[:, whole * chunk_elems :]
