"""Adapters in pages and batches over them, with their exact results, for tests of the LoRA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.gpu_kernels.landing import land_rows
from segue.gpu_kernels.lora import add_lora
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape
from segue.gpu_kernels.lora_work import plan_capacity, plan_point
from segue.gpu_kernels.paged_lora import row_stride

# Relative root mean square error of an output against float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Adapters:
    """Adapters of one LoRA point of one layer, in pages scattered over a pool whose every other element is NaN.

    ``a[slot][module]`` is [rank, in] and ``b[slot][module]`` [out, rank], float64 copies of what the pages hold.
    """

    shape: PointShape
    pool_layer: Tensor
    page_tables: Tensor
    modules: Tensor
    scales: Tensor
    ranks: NDArray[np.int32]
    a: list[list[Tensor]]
    b: list[list[Tensor]]


def make_adapters(
    shape: PointShape,
    ranks: Sequence[tuple[int, ...]],
    *,
    page_elems: int,
    chunk_elems: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> Adapters:
    """One adapter per slot, with the ranks of its modules; 0 is a module that is not targeted."""
    generator = torch.Generator().manual_seed(seed)
    elements = [_stream_elements(shape, slot, chunk_elems) for slot in ranks]
    pages = [-(-count // page_elems) for count in elements]
    pool = torch.full((sum(pages) + 3, page_elems), torch.nan, dtype=dtype, device=device)
    order = torch.randperm(len(pool), generator=generator).to(device)
    tables = torch.full((len(ranks), max(pages)), 2**30, dtype=torch.int32)
    modules = torch.zeros(len(ranks), shape.modules, 3, dtype=torch.int32)
    a: list[list[Tensor]] = []
    b: list[list[Tensor]] = []
    for slot, slot_ranks in enumerate(ranks):
        ids = order[sum(pages[:slot]) :][: pages[slot]]
        tables[slot, : len(ids)] = ids
        end = 0
        a.append([])
        b.append([])
        for module, (rank, width) in enumerate(zip(slot_ranks, shape.out_features, strict=True)):
            down = torch.randn(rank, shape.in_features, generator=generator) * shape.in_features**-0.5
            down = down.to(device, dtype)
            up = torch.randn(width, rank, generator=generator).to(device, dtype)
            b_start = end + rank * row_stride(shape.in_features, chunk_elems)
            modules[slot, module] = torch.tensor((rank, end // chunk_elems, b_start // chunk_elems))
            if rank:
                land_rows(down, pool, ids, end, chunk_elems)
                land_rows(up, pool, ids, b_start, chunk_elems, transpose=True)
            end = b_start + rank * row_stride(width, chunk_elems)
            a[slot].append(down.double())
            b[slot].append(up.double())
    return Adapters(
        shape=shape,
        pool_layer=pool,
        page_tables=tables.to(device),
        modules=modules.to(device),
        scales=torch.rand(len(ranks), shape.modules, generator=generator).to(device) + 0.5,
        ranks=np.asarray(ranks, dtype=np.int32),
        a=a,
        b=b,
    )


def _stream_elements(shape: PointShape, ranks: tuple[int, ...], chunk_elems: int) -> int:
    widths = (row_stride(shape.in_features, chunk_elems) + row_stride(out, chunk_elems) for out in shape.out_features)
    return max(1, sum(rank * width for rank, width in zip(ranks, widths, strict=True)))


def run_batch(
    adapters: Adapters,
    x: Tensor,
    base: Tensor,
    segments: list[tuple[int, int, int]],
    tiles: LoraTiles,
    *,
    segment_scales: list[float] | None = None,
) -> Tensor:
    """``base`` plus the deltas, by the kernels. Unused plan words and the workspace hold garbage."""
    rows = sum(stop - start for start, stop, _ in segments)
    capacity = plan_capacity(
        adapters.shape, tiles, max_segments=len(segments), max_rows=rows, max_rank=int(adapters.ranks.max(initial=1))
    )
    plan = np.full(capacity.words, 2**30, dtype=np.int32)
    plan_point(
        np.asarray(segments, dtype=np.int32).reshape(-1, 3),
        np.asarray([1.0] * len(segments) if segment_scales is None else segment_scales, dtype=np.float32),
        adapters.ranks,
        shape=adapters.shape,
        tiles=tiles,
        plan=plan,
        workspace_elems=capacity.workspace_elems,
    )
    out = base.clone()
    add_lora(
        x,
        out,
        pool_layer=adapters.pool_layer,
        page_tables=adapters.page_tables,
        modules=adapters.modules,
        scales=adapters.scales,
        plan=torch.from_numpy(plan).to(x.device),
        workspace=torch.full((max(capacity.workspace_elems, 1),), torch.nan, device=x.device),
        shape=adapters.shape,
        tiles=tiles,
    )
    return out


def exact(
    adapters: Adapters,
    x: Tensor,
    base: Tensor,
    segments: list[tuple[int, int, int]],
    *,
    segment_scales: list[float] | None = None,
) -> Tensor:
    """``base`` plus the deltas, in float64."""
    out = base.double()
    for number, (start, stop, slot) in enumerate(segments):
        column = 0
        for module, width in enumerate(adapters.shape.out_features):
            scale = float(adapters.scales[slot, module]) * (1.0 if segment_scales is None else segment_scales[number])
            delta = x[start:stop].double() @ adapters.a[slot][module].T @ adapters.b[slot][module].T
            out[start:stop, column : column + width] += scale * delta
            column += width
    return out


def relative_rms(result: Tensor, expected: Tensor) -> float:
    """Root mean square error over the root mean square of what is expected; NaN anywhere gives NaN."""
    error = (result.double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt())
