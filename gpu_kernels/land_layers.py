"""Landing on a GPU: one launch writes layers of an adapter from a staging buffer into its pages.

The meaning is ``landing.land_matrices``. Both sides are read and written in runs of consecutive elements: B goes
through a tile.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import knobs
from triton import language as tl

from segue.gpu_kernels.landing import LANDING_WORDS
from segue.gpu_kernels.paged_rows import loop_bound, row_offsets

_TILE_ROWS, _TILE_COLUMNS = 32, 64
_PROGRAMS_PER_MATRIX = 64


@triton.jit(do_not_specialize=["first_elem"])
def landing_kernel(
    staging: tl.tensor,
    first_elem: tl.tensor,
    table: tl.tensor,
    pool: tl.tensor,
    layer_stride: tl.tensor,
    page_table: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    chunk_elems: tl.constexpr,
    page_chunks: tl.constexpr,
    table_words: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Program (p, 2 m) writes some of A of module m, program (p, 2 m + 1) of B."""
    entry = table + tl.program_id(1) // 2 * table_words
    is_b = tl.program_id(1) % 2
    source = staging + (tl.load(entry + is_b) - first_elem)
    pages = pool + tl.load(entry + 7) * layer_stride
    rank = tl.load(entry + 2).to(tl.int32)
    width = tl.load(entry + 3 + is_b).to(tl.int32)
    start_chunk = tl.load(entry + 5 + is_b).to(tl.int32)
    row_chunks = (width + chunk_elems - 1) // chunk_elems
    row_tiles = (rank + tile_rows - 1) // tile_rows
    tiles = row_tiles * ((width + tile_columns - 1) // tile_columns)
    for tile in range(
        loop_bound(tl.program_id(0), interpreted),
        loop_bound(tiles, interpreted),
        loop_bound(tl.num_programs(0), interpreted),
    ):
        column = tile // row_tiles * tile_columns
        rows = tile % row_tiles * tile_rows + tl.arange(0, tile_rows)  # [tile_rows]
        columns = column + tl.arange(0, tile_columns)  # [tile_columns]
        inside = (rows < rank)[:, None] & (columns < width)[None, :]  # [tile_rows, tile_columns]
        if is_b == 1:
            read = source + columns[:, None].to(tl.int64) * rank + rows[None, :]  # [tile_columns, tile_rows]
            values = tl.trans(tl.load(read, mask=tl.trans(inside)))  # [tile_rows, tile_columns]
        else:
            values = tl.load(source + rows[:, None].to(tl.int64) * width + columns[None, :], mask=inside)
        target = row_offsets(
            page_table, start_chunk, rows, rows < rank, row_chunks, column, tile_columns, chunk_elems, page_chunks
        )  # [tile_rows, tile_columns]
        tl.store(pages + target, values, mask=inside)


def land_layers(
    staging: Tensor, first_elem: int, table: Tensor, pool: Tensor, page_table: Tensor, chunk_elems: int
) -> None:
    """See ``landing.land_matrices``; ``page_table`` may be int32, and what the tables say is not checked.

    Pointers that are multiples of 16 bytes have one compiled kernel for all layers. Raises ValueError for a wrong
    shape, dtype or device.
    """
    tensors = (staging, table, pool, page_table)
    if not staging.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"staging: the kernel needs a CUDA device, is on {staging.device}; see landing.land_matrices")
    if any(tensor.device != staging.device for tensor in tensors):
        raise ValueError(f"every tensor must be on one device, they are on {[str(t.device) for t in tensors]}")
    if any(not tensor.is_contiguous() for tensor in tensors) or staging.dtype != pool.dtype:
        raise ValueError(f"tensors must be contiguous, staging of the pool's dtype: {staging.dtype, pool.dtype}")
    if table.dim() != 2 or table.shape[1] != LANDING_WORDS or table.dtype != torch.int64:
        raise ValueError(f"table: must be int64 [modules, {LANDING_WORDS}], is {table.dtype} {list(table.shape)}")
    if pool.dim() != 3 or pool.shape[2] % chunk_elems:
        raise ValueError(f"pool: {list(pool.shape)} must be [layers, pages, a multiple of chunk_elems {chunk_elems}]")
    if not len(table):
        return
    landing_kernel[(_PROGRAMS_PER_MATRIX if staging.is_cuda else 2, 2 * len(table))](
        staging, first_elem, table, pool, pool.stride(0), page_table, tile_rows=_TILE_ROWS, tile_columns=_TILE_COLUMNS,
        chunk_elems=chunk_elems, page_chunks=pool.shape[2] // chunk_elems, table_words=LANDING_WORDS,
        interpreted=knobs.runtime.interpret, num_warps=4,
    )  # fmt: skip


def compile_landing(pool: Tensor, chunk_elems: int) -> None:
    """Compile the kernel for a pool, by a launch that has nothing to do. It takes a second the first time."""
    nothing = torch.zeros(1, LANDING_WORDS, dtype=torch.int64, device=pool.device)
    land_layers(pool.new_empty(1), 0, nothing, pool, nothing.view(-1), chunk_elems)
