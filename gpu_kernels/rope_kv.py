"""Rotary embedding and the store of keys and values into the pages, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import knobs
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_BLOCK_HEADS = 8


def rotate_and_store_reference(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, table: Tensor, kv: Tensor
) -> None:
    """Rotate ``q`` [T, heads, head_dim] in place; put rotated ``k`` and ``v`` [T, kv_heads, head_dim] at their slots.

    ``table`` float32 [context, head_dim] has the cosines of each position, then its sines (Su et al., 2021,
    arXiv:2104.09864; halves are paired). Row i is at ``positions[i]``, and its slot is token ``slots[i] % page_tokens``
    of page ``slots[i] // page_tokens`` of ``kv`` [pages, 2, page_tokens, kv_heads, head_dim]. Computed in float32.
    """
    page_tokens = kv.shape[2]
    cos, sin = table[positions.long()][:, None].chunk(2, dim=-1)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    pages, offsets = slots.long() // page_tokens, slots.long() % page_tokens
    kv[pages, 0, offsets] = rotated(k)
    kv[pages, 1, offsets] = v
    q.copy_(rotated(q))


@triton.jit
def rotate_and_store_kernel(
    q: tl.tensor,
    q_stride: tl.tensor,
    k: tl.tensor,
    k_stride: tl.tensor,
    v: tl.tensor,
    v_stride: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    kv: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half_block: tl.constexpr,
    page_tokens: tl.constexpr,
    block_heads: tl.constexpr,
    dependent_launch: tl.constexpr,
) -> None:
    """A program serves ``block_heads`` heads of a row: of its queries, its keys, or its values."""
    q_groups: tl.constexpr = (heads + block_heads - 1) // block_heads
    k_groups: tl.constexpr = (kv_heads + block_heads - 1) // block_heads
    groups: tl.constexpr = q_groups + 2 * k_groups
    program = tl.program_id(0)
    if dependent_launch:
        gdc_launch_dependents()
    row = (program // groups).to(tl.int64)
    group = program % groups
    half: tl.constexpr = head_dim // 2
    column = tl.arange(0, half_block)  # [half_block]
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    cos = tl.load(table + position * head_dim + column, mask=column < half, other=0.0)[None, :]
    sin = tl.load(table + position * head_dim + half + column, mask=column < half, other=0.0)[None, :]
    # The halves of keys, then of values, of one token of a page.
    target = kv + ((slot // page_tokens) * 2 * page_tokens + slot % page_tokens) * kv_heads * head_dim
    if dependent_launch:
        gdc_wait()
    if group < q_groups:
        head = group * block_heads + tl.arange(0, block_heads)[:, None]  # [block_heads, 1]
        inside = (head < heads) & (column < half)[None, :]  # [block_heads, half_block]
        own = q + row * q_stride + head * head_dim + column[None, :]  # [block_heads, half_block]
        first = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(own + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(own, (first * cos - second * sin).to(q.dtype.element_ty), mask=inside)
        tl.store(own + half, (second * cos + first * sin).to(q.dtype.element_ty), mask=inside)
    elif group < q_groups + k_groups:
        head = (group - q_groups) * block_heads + tl.arange(0, block_heads)[:, None]  # [block_heads, 1]
        inside = (head < kv_heads) & (column < half)[None, :]  # [block_heads, half_block]
        source = k + row * k_stride + head * head_dim + column[None, :]  # [block_heads, half_block]
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        place = target + head * head_dim + column[None, :]  # [block_heads, half_block]
        tl.store(place, (first * cos - second * sin).to(kv.dtype.element_ty), mask=inside)
        tl.store(place + half, (second * cos + first * sin).to(kv.dtype.element_ty), mask=inside)
    else:
        head = (group - q_groups - k_groups) * block_heads + tl.arange(0, block_heads)[:, None]
        inside = (head < kv_heads) & (column < half)[None, :]  # [block_heads, half_block]
        source = v + row * v_stride + head * head_dim + column[None, :]  # [block_heads, half_block]
        place = target + page_tokens * kv_heads * head_dim + head * head_dim + column[None, :]
        tl.store(place, tl.load(source, mask=inside), mask=inside)
        tl.store(place + half, tl.load(source + half, mask=inside), mask=inside)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    kv: Tensor,
) -> None:
    """See ``rotate_and_store_reference``. ``positions`` and ``slots`` are int32 [T], and not checked against the table
    and the pages.

    Rows may be parts of longer ones. Raises ValueError for a wrong shape, dtype, layout or device.
    """
    _check(q, k, v, positions, slots, table, kv)
    rows, heads, head_dim = q.shape
    kv_heads, page_tokens = k.shape[1], kv.shape[2]
    groups = triton.cdiv(heads, _BLOCK_HEADS) + 2 * triton.cdiv(kv_heads, _BLOCK_HEADS)
    if not rows:
        return
    # A multiprocessor before Hopper has no such launches.
    dependent = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    rotate_and_store_kernel[(rows * groups,)](
        q, q.stride(0), k, k.stride(0), v, v.stride(0), positions, slots, table, kv,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        half_block=triton.next_power_of_2(head_dim // 2), page_tokens=page_tokens, block_heads=_BLOCK_HEADS,
        dependent_launch=dependent, num_warps=4,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: Tensor,
    kv: Tensor,
) -> None:
    if not q.is_cuda and not knobs.runtime.interpret:
        raise ValueError(f"q: the kernel needs a CUDA device, it is on {q.device}")
    tensors = (q, k, v, positions, slots, table, kv)
    if any(tensor.device != q.device for tensor in tensors):
        raise ValueError(f"every tensor must be on one device, they are on {[str(t.device) for t in tensors]}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or (len(k), k.shape[2]) != (len(q), q.shape[2]):
        raise ValueError(f"q, k and v must be rows of heads: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    rows, _, head_dim = q.shape
    if head_dim % 2 or any(tensor.stride()[1:] != (head_dim, 1) for tensor in (q, k, v) if tensor.numel()):
        raise ValueError("the heads of a row must be consecutive, and of an even width")
    if kv.dim() != 5 or kv.shape[1] != 2 or kv.shape[3:] != k.shape[1:] or not kv.is_contiguous():
        raise ValueError(f"kv: must be contiguous [pages, 2, page_tokens, {k.shape[1]}, {head_dim}]: {list(kv.shape)}")
    if len({q.dtype, k.dtype, v.dtype, kv.dtype}) != 1:
        raise ValueError(f"q, k, v and kv need one dtype: {q.dtype, k.dtype, v.dtype, kv.dtype}")
    if table.dim() != 2 or table.shape[1] != head_dim or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"table: must be float32 [context, {head_dim}], is {table.dtype} {list(table.shape)}")
    for name, tensor in (("positions", positions), ("slots", slots)):
        if tensor.shape != (rows,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: must be int32 [{rows}], is {tensor.dtype} {list(tensor.shape)}")
