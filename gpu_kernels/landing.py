"""Landing: writing an adapter's matrices into pages, in the layout that ``paged_lora`` reads."""

from __future__ import annotations

import torch
from torch import Tensor

from segue.gpu_kernels.paged_lora import covered_pages, row_stride


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
    target = target.view(rows, -1)

    whole = columns // chunk_elems
    if whole:
        chunks[target[:, :whole]] = matrix[:, : whole * chunk_elems].reshape(rows, whole, chunk_elems)
    rest = columns - whole * chunk_elems
    if rest:
        chunks[target[:, whole], :rest] = matrix[:, whole * chunk_elems :]
