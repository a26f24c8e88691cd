"""Attention over paged KV in torch: what the CPU device runs.

Unwritten slots of a page may hold NaN, and 0 * NaN is NaN: a slot behind a sequence's end is either never gathered or
replaced before it meets a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.batch import RowBatch, SequenceRows


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one row each and a like number of pages, padded to the longest.

    ``rows`` is [S]. ``page_tables`` is [S, pages], padded with a page of the sequence itself. ``unwritten``
    [S, pages * page_tokens] says which of its slots hold no token, ``unwritten_slots`` [n] counts them through.
    """

    rows: Tensor
    page_tables: Tensor
    unwritten: Tensor
    unwritten_slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How a batch's attention is computed; the same for every layer, so it is made once for a pass."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[SequenceRows, ...]

    @classmethod
    def of(cls, batch: RowBatch, page_tokens: int) -> AttentionPlan:
        """Rows that are alone in their sequence are decoded in groups, so that padding at most doubles the KV read."""
        groups: dict[int, list[SequenceRows]] = {}
        for sequence in batch.sequences:
            if sequence.rows == 1:
                pages = -(-sequence.total_tokens // page_tokens)
                groups.setdefault((pages - 1).bit_length(), []).append(sequence)
        return cls(
            decodes=tuple(_decode_group(members, page_tokens) for members in groups.values()),
            prefills=tuple(sequence for sequence in batch.sequences if sequence.rows > 1),
        )


def write_kv(kv: Tensor, slot_pages: Tensor, slot_offsets: Tensor, k: Tensor, v: Tensor) -> None:
    """Store each row's key and value [rows, kv_heads, head_dim] at its slot of ``kv``, one layer of the pool."""
    kv[slot_pages, 0, slot_offsets] = k
    kv[slot_pages, 1, slot_offsets] = v


def paged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention of every row over its own sequence, itself included.

    ``q`` is [rows, heads, head_dim], ``kv`` one layer of the pool [pages, 2, page_tokens, kv_heads, head_dim] in which
    the rows' own keys and values are written already. Scores are scaled by 1 / sqrt(head_dim); query heads share key
    heads in consecutive groups (Ainslie et al., 2023, arXiv:2305.13245). Returns [rows, heads, head_dim].
    """
    out = torch.empty_like(q)
    for group in plan.decodes:
        out[group.rows] = _decode(q[group.rows], kv, group)
    for sequence in plan.prefills:
        rows = slice(sequence.row_start, sequence.row_stop)
        out[rows] = _prefill(q[rows], kv, sequence)
    return out


def _decode_group(members: Sequence[SequenceRows], page_tokens: int) -> DecodeGroup:
    lengths = torch.tensor([sequence.total_tokens for sequence in members])
    pages = [-(-sequence.total_tokens // page_tokens) for sequence in members]
    tables = [
        functional.pad(sequence.page_table[:count], (0, max(pages) - count), value=int(sequence.page_table[0]))
        for sequence, count in zip(members, pages, strict=True)
    ]
    unwritten = torch.arange(max(pages) * page_tokens) >= lengths[:, None]
    return DecodeGroup(
        rows=torch.tensor([sequence.row_start for sequence in members]),
        page_tables=torch.stack(tables),
        unwritten=unwritten,
        unwritten_slots=unwritten.view(-1).nonzero().view(-1),
    )


def _read(kv: Tensor, pages: Tensor, half: int) -> Tensor:
    """A copy of the keys (half 0) or values (1) of ``pages`` [n]: [n * page_tokens, kv_heads, head_dim]."""
    _, _, page_tokens, kv_heads, head_dim = kv.shape
    halves = kv.view(-1, page_tokens * kv_heads * head_dim)
    return halves.index_select(0, 2 * pages + half).view(-1, kv_heads, head_dim)


def _decode(q: Tensor, kv: Tensor, group: DecodeGroup) -> Tensor:
    """One row for each sequence: q [S, heads, head_dim] to [S, heads, head_dim], computed in float32."""
    sequences, heads, head_dim = q.shape
    kv_heads, pages = kv.shape[3], group.page_tables.view(-1)
    k = _read(kv, pages, 0).view(sequences, -1, kv_heads, head_dim).float()
    v = _read(kv, pages, 1).index_fill_(0, group.unwritten_slots, 0.0).view(k.shape).float()
    grouped = q.float().view(sequences, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    out = torch.empty_like(grouped)
    # One product for each key head reads K and V as they lie; one for all of them would copy both.
    for head in range(kv_heads):
        scores = torch.bmm(grouped[:, head], k[:, :, head].transpose(1, 2))
        probabilities = scores.masked_fill_(group.unwritten[:, None], -torch.inf).softmax(dim=-1)
        out[:, head] = torch.bmm(probabilities, v[:, :, head])
    return out.view(sequences, heads, head_dim).to(q.dtype)


def _prefill(q: Tensor, kv: Tensor, sequence: SequenceRows) -> Tensor:
    """The rows of one sequence: q [rows, heads, head_dim] to [rows, heads, head_dim]."""
    total, page_tokens = sequence.total_tokens, kv.shape[2]
    pages = sequence.page_table[: -(-total // page_tokens)]
    k, v = (_read(kv, pages, half)[:total].transpose(0, 1)[None] for half in (0, 1))
    mask = None
    if sequence.context_tokens:
        ones = torch.ones(sequence.rows, total, dtype=torch.bool, device=q.device)
        mask = ones.tril_(sequence.context_tokens)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)
