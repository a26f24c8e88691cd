"""Matrix products of few rows: time is the weights' way from memory, so the kernel is a stream of weights.

A library's kernels leave a fifth of the bandwidth unused in narrow products, and the launch behind them begins when
they have ended. Here the next one begins, and finds out what it has to do, under this one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton import knobs
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from segue.gpu_kernels.paged_rows import add_product, loop_bound

# More rows are as fast through a library; so are wide products from a few rows on.
_MOST_ROWS = 32
_WIDE_ROWS = 4
# So many columns give each multiprocessor of a large GPU about one program.
_NARROW_FEATURES = 4096
_DTYPES = (torch.bfloat16, torch.float16)


class LinearTiles(NamedTuple):
    """A program makes ``columns`` columns of the output for all rows, ``step`` columns of the weights at a time, with
    ``stages`` of these on their way."""

    columns: int
    step: int
    stages: int
    warps: int


def few_rows_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [rows, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]: [rows, out]."""
    return functional.linear(x, weight, bias)


@triton.jit(do_not_specialize=["rows"])
def few_rows_linear_kernel(
    x: tl.tensor,
    x_stride: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor | None,
    out: tl.tensor,
    out_stride: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    row_tile: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
    stages: tl.constexpr,
    dependent_launch: tl.constexpr,
    interpreted: tl.constexpr,
) -> None:
    """Program i makes columns i * ``columns`` and up of all rows."""
    if dependent_launch:
        gdc_launch_dependents()
    row = tl.arange(0, row_tile)  # [row_tile]
    column = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)  # [columns]
    place = tl.arange(0, step)  # [step]
    w_tile = weight + column[:, None] * in_features + place[None, :]  # [columns, step]
    x_tile = x + row[None, :].to(tl.int64) * x_stride + place[:, None]  # [step, row_tile]
    known = (row < rows)[None, :]  # [1, row_tile]
    total = tl.zeros((columns, row_tile), dtype=tl.float32)  # [columns, row_tile]
    if dependent_launch:
        gdc_wait()
    for first in tl.range(0, loop_bound(in_features, interpreted), step, num_stages=stages):
        w = tl.load(w_tile + first, eviction_policy="evict_first")  # [columns, step]
        values = tl.load(x_tile + first, mask=known, other=0.0)  # [step, row_tile]
        total = add_product(w, values, total, interpreted)
    if bias is not None:
        total += tl.load(bias + column).to(tl.float32)[:, None]
    target = out + row[None, :].to(tl.int64) * out_stride + column[:, None]  # [columns, row_tile]
    tl.store(target, total.to(out.dtype.element_ty), mask=known)


def choose_tiles(rows: int, out_features: int, in_features: int) -> LinearTiles | None:
    """The tiles for a product, None where a library's kernels are as fast.

    Measured on an H200 with the shapes of an 8B model: docs/notes-cuda-engine.md. Narrow products gain most, which a
    library divides among too few programs.
    """
    if not 1 <= rows <= _MOST_ROWS or out_features % 64 or in_features % 256:
        return None
    if out_features <= _NARROW_FEATURES:
        return LinearTiles(columns=64, step=128, stages=8, warps=4)
    if out_features <= 4 * _NARROW_FEATURES:
        return LinearTiles(columns=64, step=256, stages=3, warps=4)
    return LinearTiles(columns=64, step=128, stages=4, warps=4) if rows <= _WIDE_ROWS else None


def few_rows_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: LinearTiles, *, out: Tensor | None = None
) -> Tensor:
    """See ``few_rows_linear_reference``: sums in float32, rounded once to the dtype, bfloat16 or float16.

    ``rows`` from 1 to 32; ``x`` and ``out`` may be parts of longer rows. Raises ValueError for a wrong shape, dtype,
    layout or device.
    """
    rows, in_features = x.shape
    out_features = len(weight)
    if out is None:
        out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    _check(x, weight, bias, tiles, out)
    dependent = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    few_rows_linear_kernel[(out_features // tiles.columns,)](
        x, x.stride(0), weight, bias, out, out.stride(0), rows, in_features,
        row_tile=max(16, triton.next_power_of_2(rows)), columns=tiles.columns, step=tiles.step, stages=tiles.stages,
        dependent_launch=dependent, interpreted=knobs.runtime.interpret, num_warps=tiles.warps,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: LinearTiles, out: Tensor) -> None:
    tensors = [x, weight, out, *([] if bias is None else [bias])]
    if not x.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"x: the kernel needs a CUDA device, it is on {x.device}")
    if any(tensor.device != x.device or tensor.dtype != x.dtype for tensor in tensors) or x.dtype not in _DTYPES:
        raise ValueError(f"every tensor must be on one device and of one dtype of {_DTYPES}, x is {x.dtype}")
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or not 1 <= len(x) <= _MOST_ROWS:
        raise ValueError(
            f"x and weight must be [1 to {_MOST_ROWS}, in] and [out, in]: {list(x.shape)}, {list(weight.shape)}"
        )
    if len(weight) % tiles.columns or weight.shape[1] % tiles.step:
        raise ValueError(f"weight: {list(weight.shape)} is not a multiple of {[tiles.columns, tiles.step]}")
    if out.shape != (len(x), len(weight)) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"out and bias must have {len(weight)} columns for {len(x)} rows")
    if not weight.is_contiguous() or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("the elements of a row must be consecutive, and the weight contiguous")
