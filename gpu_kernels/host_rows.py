"""Rows on their way to host memory that others compute on, and what they computed on its way back: one launch each.

Kernels write and read memory that is registered with CUDA themselves: for some hundred rows that takes what the bytes
take on the link, where asynchronous copies take several times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import knobs
from triton import language as tl

# Projections whose deltas one launch adds.
MAX_COLUMN_RANGES = 3
_BLOCK = 1024


def pack_rows_reference(x: Tensor, rows: Tensor | None, packed: Tensor) -> None:
    """``packed`` [R, width] becomes rows ``rows`` int64 [R] of ``x`` [T, width]; its first R without ``rows``."""
    packed.copy_(x[: len(packed)] if rows is None else x[rows])


def add_rows_reference(
    deltas: Tensor, rows: Tensor | None, out: Tensor, columns: Sequence[tuple[int, int, int]]
) -> None:
    """Add ``deltas`` [R, delta_width] to rows ``rows`` int64 [R] of ``out`` [T, n] in place; to its first R without.

    ``columns`` are (first column in ``deltas``, first column in ``out``, width) of each range that is added.
    """
    places = slice(0, len(deltas)) if rows is None else rows
    for in_deltas, in_out, width in columns:
        out[places, in_out : in_out + width] += deltas[:, in_deltas : in_deltas + width]


@triton.jit
def pack_rows_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    rows: tl.tensor | None,
    packed: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Program (i, j) writes block j of row i."""
    row = tl.program_id(0).to(tl.int64)
    source = row if rows is None else tl.load(rows + row)
    columns = tl.program_id(1) * block + tl.arange(0, block)  # [block]
    values = tl.load(x + source * x_stride + columns, mask=columns < width)  # [block]
    tl.store(packed + row * width + columns, values, mask=columns < width)


@triton.jit
def _add_range(
    deltas_row: tl.tensor,
    out_row: tl.tensor,
    in_deltas: tl.tensor,
    in_out: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * block + tl.arange(0, block)  # [block]
    inside = columns < width
    # Another processor writes this memory between two launches.
    deltas = tl.load(deltas_row + in_deltas + columns, mask=inside, volatile=True)  # [block]
    target = out_row + in_out + columns  # [block]
    total = tl.load(target, mask=inside).to(tl.float32) + deltas.to(tl.float32)  # [block]
    tl.store(target, total.to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def add_rows_kernel(
    deltas: tl.tensor,
    delta_width: tl.tensor,
    rows: tl.tensor | None,
    out: tl.tensor,
    out_stride: tl.tensor,
    in_deltas_0: tl.tensor,
    in_out_0: tl.tensor,
    width_0: tl.tensor,
    in_deltas_1: tl.tensor,
    in_out_1: tl.tensor,
    width_1: tl.tensor,
    in_deltas_2: tl.tensor,
    in_out_2: tl.tensor,
    width_2: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Program (i, j, k) adds block j of range k to row i.

    Each range has arguments of its own, so that the compiler knows which of them are multiples of 16.
    """
    row = tl.program_id(0).to(tl.int64)
    target = row if rows is None else tl.load(rows + row)
    deltas_row = deltas + row * delta_width
    out_row = out + target * out_stride
    if tl.program_id(2) == 0:
        _add_range(deltas_row, out_row, in_deltas_0, in_out_0, width_0, block)
    elif tl.program_id(2) == 1:
        _add_range(deltas_row, out_row, in_deltas_1, in_out_1, width_1, block)
    else:
        _add_range(deltas_row, out_row, in_deltas_2, in_out_2, width_2, block)


def pack_rows(x: Tensor, rows: Tensor | None, packed: Tensor) -> None:
    """See ``pack_rows_reference``. ``packed`` is contiguous host memory that is registered with CUDA, or any memory.

    Rows are not checked against ``x``. Raises ValueError for a wrong shape, dtype, layout or device.
    """
    _check(x, rows, packed)
    if x.shape[1] != packed.shape[1]:
        raise ValueError(f"packed: has {packed.shape[1]} columns, x has {x.shape[1]}")
    count, width = packed.shape
    if count:
        pack_rows_kernel[(count, triton.cdiv(width, _BLOCK))](x, x.stride(0), rows, packed, width, block=_BLOCK)


def add_rows(deltas: Tensor, rows: Tensor | None, out: Tensor, columns: Sequence[tuple[int, int, int]]) -> None:
    """See ``add_rows_reference``. ``deltas`` is contiguous host memory that is registered with CUDA, or any memory.

    Sums are rounded once, to the dtype of ``out``. Rows are not checked against ``out``, and must differ. Raises
    ValueError for a wrong shape, dtype, layout or device, or columns beyond those of ``deltas`` or ``out``.
    """
    _check(out, rows, deltas)
    if not 1 <= len(columns) <= MAX_COLUMN_RANGES:
        raise ValueError(f"columns: must be 1 to {MAX_COLUMN_RANGES} ranges, are {len(columns)}")
    for in_deltas, in_out, width in columns:
        if min(in_deltas, in_out, width) < 0 or in_deltas + width > deltas.shape[1] or in_out + width > out.shape[1]:
            raise ValueError(
                f"columns: {width} at {in_deltas} and {in_out} exceed deltas of {deltas.shape[1]} columns or an "
                f"output of {out.shape[1]}"
            )
    blocks = triton.cdiv(max(width for _, _, width in columns), _BLOCK)
    padded = [*columns, *[(0, 0, 0)] * (MAX_COLUMN_RANGES - len(columns))]
    if len(deltas) and blocks:
        add_rows_kernel[(len(deltas), blocks, len(columns))](
            deltas, deltas.shape[1], rows, out, out.stride(0), *(word for item in padded for word in item), block=_BLOCK
        )


def _check(on_device: Tensor, rows: Tensor | None, buffer: Tensor) -> None:
    """``buffer`` [R, width] is in host memory as a rule, the rest where the kernel runs."""
    if not on_device.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"the kernel needs a CUDA device, rows are on {on_device.device}")
    if on_device.dim() != 2 or buffer.dim() != 2 or on_device.dtype != buffer.dtype:
        raise ValueError(
            f"rows and buffer must be matrices of one dtype, are {on_device.dtype} {list(on_device.shape)} and "
            f"{buffer.dtype} {list(buffer.shape)}"
        )
    if (on_device.shape[1] > 1 and on_device.stride(1) != 1) or not buffer.is_contiguous():
        raise ValueError("the columns of rows must be consecutive, and the buffer contiguous")
    if rows is None:
        if len(buffer) > len(on_device):
            raise ValueError(f"rows: there are {len(on_device)}, the buffer has {len(buffer)}")
    elif rows.shape != (len(buffer),) or rows.dtype != torch.int64 or rows.device != on_device.device:
        raise ValueError(
            f"rows: must be int64 [{len(buffer)}] on {on_device.device}, is {rows.dtype} {list(rows.shape)} on "
            f"{rows.device}"
        )
