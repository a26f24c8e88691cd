"""LoRA over paged weights on one GPU: one call adds the deltas of one LoRA point of one layer.

The meaning is that of ``paged_lora``: ``out += scale * (x A^T) B^T`` for every row's segments and every module, with
float32 accumulation, float32 inputs exactly so (no TF32), and one rounding of the output. Everything that depends on
the batch or on the adapters is data on the device: the call neither synchronises nor recompiles when they change, and
may be captured in a CUDA graph.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from triton import knobs

from segue.gpu_kernels.lora_expand import expand_kernel
from segue.gpu_kernels.lora_plan import HEADER_WORDS, SHRINK_WORDS
from segue.gpu_kernels.lora_shrink import shrink_kernel
from segue.gpu_kernels.lora_tiles import LoraTiles, PointShape

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_lora(
    x: Tensor,
    out: Tensor,
    *,
    pool_layer: Tensor,
    page_tables: Tensor,
    modules: Tensor,
    scales: Tensor,
    plan: Tensor,
    workspace: Tensor,
    shape: PointShape,
    tiles: LoraTiles,
    dependent_launch: bool = True,
) -> None:
    """Add every delta of ``plan`` into ``out`` [T, sum of out_features], in place, from x [T, in_features].

    ``pool_layer`` [pages, page_elems] is the layer's pages in x's dtype (bfloat16, float16 or float32); ``page_tables``
    is int32 [slots, max_pages]; ``modules`` int32 [slots, modules, 3] holds (rank, first chunk of A, first chunk of B)
    of this layer's adapters, rank 0 where a module is not targeted; ``scales`` is float32 [slots, modules]; ``plan``
    int32 [words] is what ``plan_point`` wrote with the same ``shape`` and ``tiles``; ``workspace`` float32 holds the
    partials. Rows of tensors may be strided, their elements are contiguous. A layer's rank may be at most that of the
    plan. With ``dependent_launch`` each of the two kernels begins, and loads weights, under the launch before it, where
    the device can do so (compute capability 9.0): under shrink, or whatever computes x and out. Raises ValueError for a
    wrong shape, dtype or device.
    """
    _check(x, out, pool_layer, page_tables, modules, scales, plan, workspace, shape, tiles)
    dependent = dependent_launch and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    early = {"launch_pdl": True} if dependent else {}
    shrink_kernel[(tiles.shrink_programs,)](
        plan, workspace, x, x.stride(0), pool_layer, page_tables, page_tables.stride(0), modules, modules.stride(0),
        in_features=shape.in_features, row_tile=tiles.rows, ranks=tiles.ranks, span=tiles.span, step=tiles.step,
        vector_ranks=tiles.vector[0], vector_columns=tiles.vector[1], chunk_elems=tiles.chunk_elems,
        page_chunks=tiles.page_chunks, stages=tiles.stages, vector_stages=tiles.vector_stages,
        header_words=HEADER_WORDS, item_words=SHRINK_WORDS, dependent_launch=dependent,
        interpreted=knobs.runtime.interpret, num_warps=tiles.shrink_warps, maxnreg=tiles.shrink_registers, **early,
    )  # fmt: skip
    expand_kernel[(tiles.expand_programs,)](
        plan, workspace, pool_layer, page_tables, page_tables.stride(0), modules, modules.stride(0), scales,
        scales.stride(0), out, out.stride(0), out_align=gcd(16, *shape.out_features), row_tile=tiles.rows,
        wide_ranks=tiles.wide[0], wide_columns=tiles.wide[1], tall_ranks=tiles.tall[0], tall_columns=tiles.tall[1],
        chunk_elems=tiles.chunk_elems, page_chunks=tiles.page_chunks, dependent_launch=dependent,
        interpreted=knobs.runtime.interpret, num_warps=tiles.expand_warps, num_stages=tiles.expand_stages,
        maxnreg=tiles.expand_registers, **early,
    )  # fmt: skip


def _check(
    x: Tensor,
    out: Tensor,
    pool_layer: Tensor,
    page_tables: Tensor,
    modules: Tensor,
    scales: Tensor,
    plan: Tensor,
    workspace: Tensor,
    shape: PointShape,
    tiles: LoraTiles,
) -> None:
    tensors = (x, out, pool_layer, page_tables, modules, scales, plan, workspace)
    if not x.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"x: the kernels need a CUDA device, x is on {x.device}; the CPU is served by paged_lora")
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"every tensor must be on one device, they are on {[str(t.device) for t in tensors]}")
    if x.dtype not in _DTYPES or out.dtype != x.dtype or pool_layer.dtype != x.dtype:
        raise ValueError(f"x, out and pool_layer need one dtype of {_DTYPES}: {x.dtype, out.dtype, pool_layer.dtype}")
    if x.dim() != 2 or x.shape[1] != shape.in_features:
        raise ValueError(f"x: must be [T, {shape.in_features}], is {list(x.shape)}")
    if out.shape != (x.shape[0], sum(shape.out_features)):
        raise ValueError(f"out: must be {[x.shape[0], sum(shape.out_features)]}, is {list(out.shape)}")
    if pool_layer.dim() != 2 or pool_layer.shape[1] != tiles.page_elems or not pool_layer.is_contiguous():
        raise ValueError(f"pool_layer: must be contiguous [pages, {tiles.page_elems}], is {list(pool_layer.shape)}")
    slots = page_tables.shape[0]
    if modules.shape != (slots, shape.modules, 3) or modules.stride()[1:] != (3, 1):
        raise ValueError(f"modules: must be {[slots, shape.modules, 3]} with whole rows, is {list(modules.shape)}")
    if scales.shape != (slots, shape.modules) or scales.dtype != torch.float32:
        raise ValueError(f"scales: must be float32 {[slots, shape.modules]}, is {scales.dtype} {list(scales.shape)}")
    if any(tensor.dtype != torch.int32 for tensor in (page_tables, modules, plan)) or workspace.dtype != torch.float32:
        raise ValueError("page_tables, modules and plan must be int32, and workspace float32")
    if any(tensor.dim() and tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the elements of every tensor's rows must be contiguous")
