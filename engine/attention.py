"""Attention over paged KV in torch: what the CPU device runs, and CUDA where no kernel serves the shape.

Slots without a token may hold NaN, and 0 * NaN is NaN: such a slot is either never gathered or replaced before it meets
a sum. Pages that lie before the window of every row are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.batch import RowBatch, SequenceRows
from segue.engine.memory.pool import PagePool
from segue.engine.models.rope import RotaryEmbedding, apply_rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one row each that see a like number of pages, padded to the most.

    ``rows`` is [S]. ``page_tables`` [S, pages] has the pages that hold a visible token, padded with a page of the
    sequence itself. ``hidden`` [S, pages * page_tokens] says which of their slots the row does not see: those before
    its window and those behind its sequence's end. ``hidden_slots`` [n] counts these through.
    """

    rows: Tensor
    page_tables: Tensor
    hidden: Tensor
    hidden_slots: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRows:
    """Rows ``row_start`` to ``row_stop`` are one sequence's, from position ``first_position`` on.

    ``pages`` [n] has the pages that hold a token which any of the rows sees; they begin at position ``page_position``.
    """

    row_start: int
    row_stop: int
    first_position: int
    page_position: int
    pages: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """How a batch's attention is computed: the same for every layer of one window, so it is made once for a pass."""

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillRows, ...]
    window: int | None

    @classmethod
    def of(cls, batch: RowBatch, page_tokens: int, window: int | None = None) -> AttentionPlan:
        """A row at position p sees the keys p - window + 1 to p; all up to p where ``window`` is None.

        Rows that are alone in their sequence are decoded in groups, so that padding at most doubles the KV read.
        """
        groups: dict[int, list[SequenceRows]] = {}
        for sequence in batch.sequences:
            if sequence.rows == 1:
                pages = len(_visible_pages(sequence, page_tokens, window))
                groups.setdefault((pages - 1).bit_length(), []).append(sequence)
        return cls(
            decodes=tuple(_decode_group(members, page_tokens, window) for members in groups.values()),
            prefills=tuple(
                _prefill_rows(sequence, page_tokens, window) for sequence in batch.sequences if sequence.rows > 1
            ),
            window=window,
        )

    def to(self, device: torch.device) -> AttentionPlan:
        """The same with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        names = ("rows", "page_tables", "hidden", "hidden_slots")
        decodes = (
            replace(group, **{name: getattr(group, name).to(device) for name in names}) for group in self.decodes
        )
        prefills = (replace(rows, pages=rows.pages.to(device)) for rows in self.prefills)
        return replace(self, decodes=tuple(decodes), prefills=tuple(prefills))


class AttentionStep(Protocol):
    """Attention of one batch, through all layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate queries [rows, heads, head_dim] and keys [rows, kv_heads, head_dim] at the rows' positions, store keys
        and values, and attend: [rows, heads, head_dim].

        ``q`` and ``k`` may be overwritten.
        """
        ...

    def close(self) -> None:
        """The batch has ended, or was given up."""
        ...


class AttentionBackend(Protocol):
    """What attends over the pool's pages."""

    def begin(self, batch: RowBatch) -> AttentionStep:
        """Plan a batch, whose tensors are on the CPU."""
        ...


class TorchAttention:
    """In torch, on any device, in any dtype and for any shape. ``windows`` has each layer's, as in AttentionPlan."""

    def __init__(self, pool: PagePool, windows: Sequence[int | None], rotary: RotaryEmbedding) -> None:
        self._pool = pool
        self._windows = tuple(windows)
        self._rotary = rotary

    def begin(self, batch: RowBatch) -> TorchAttentionStep:
        device = self._pool.data.device
        plans = {
            window: AttentionPlan.of(batch, self._pool.page_tokens, window).to(device) for window in set(self._windows)
        }
        on_device = batch.to(device)
        return TorchAttentionStep(
            self._pool,
            [plans[window] for window in self._windows],
            self._rotary.cos_sin(on_device.positions, self._pool.dtype),
            on_device.slot_pages,
            on_device.slot_offsets,
        )


class TorchAttentionStep:
    """See AttentionStep. ``plans`` has one for each layer, ``cos_sin`` [rows, head_dim] each."""

    def __init__(
        self,
        pool: PagePool,
        plans: Sequence[AttentionPlan],
        cos_sin: tuple[Tensor, Tensor],
        slot_pages: Tensor,
        slot_offsets: Tensor,
    ) -> None:
        self._pool = pool
        self._plans = plans
        self._cos_sin = cos_sin
        self._slot_pages = slot_pages
        self._slot_offsets = slot_offsets

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = self._pool.kv(layer)
        write_kv(kv, self._slot_pages, self._slot_offsets, apply_rotary(k, *self._cos_sin), v)
        return paged_attention(apply_rotary(q, *self._cos_sin), kv, self._plans[layer])

    def close(self) -> None:
        """It holds nothing."""


def write_kv(kv: Tensor, slot_pages: Tensor, slot_offsets: Tensor, k: Tensor, v: Tensor) -> None:
    """Store each row's key and value [rows, kv_heads, head_dim] at its slot of ``kv``, one layer of the pool."""
    kv[slot_pages, 0, slot_offsets] = k
    kv[slot_pages, 1, slot_offsets] = v


def paged_attention(q: Tensor, kv: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention of every row over its own sequence, itself included, within the plan's window.

    ``q`` is [rows, heads, head_dim], ``kv`` one layer of the pool [pages, 2, page_tokens, kv_heads, head_dim] in which
    the rows' own keys and values are written already. Scores are scaled by 1 / sqrt(head_dim); query heads share key
    heads in consecutive groups (Ainslie et al., 2023, arXiv:2305.13245). Returns [rows, heads, head_dim].
    """
    out = torch.empty_like(q)
    for group in plan.decodes:
        out[group.rows] = _decode(q[group.rows], kv, group)
    for item in plan.prefills:
        rows = slice(item.row_start, item.row_stop)
        out[rows] = _prefill(q[rows], kv, item, plan.window)
    return out


def _visible_pages(sequence: SequenceRows, page_tokens: int, window: int | None) -> range:
    """The places in the sequence's page table of the pages that hold a token which any of its rows sees."""
    oldest = 0 if window is None else max(0, sequence.context_tokens + 1 - window)
    return range(oldest // page_tokens, -(-sequence.total_tokens // page_tokens))


def _decode_group(members: Sequence[SequenceRows], page_tokens: int, window: int | None) -> DecodeGroup:
    visible = [_visible_pages(sequence, page_tokens, window) for sequence in members]
    longest = max(len(places) for places in visible)
    tables = [
        functional.pad(table, (0, longest - len(table)), value=int(table[0]))
        for table in (
            sequence.page_table[places.start : places.stop] for sequence, places in zip(members, visible, strict=True)
        )
    ]
    starts = torch.tensor([places.start * page_tokens for places in visible])
    positions = starts[:, None] + torch.arange(longest * page_tokens)
    ends = torch.tensor([sequence.total_tokens for sequence in members])[:, None]
    hidden = positions >= ends
    if window is not None:
        hidden |= positions < ends - window
    return DecodeGroup(
        rows=torch.tensor([sequence.row_start for sequence in members]),
        page_tables=torch.stack(tables),
        hidden=hidden,
        hidden_slots=hidden.view(-1).nonzero().view(-1),
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
    v = _read(kv, pages, 1).index_fill_(0, group.hidden_slots, 0.0).view(k.shape).float()
    grouped = q.float().view(sequences, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    out = torch.empty_like(grouped)
    # One product for each key head reads K and V as they lie; one for all of them would copy both.
    for head in range(kv_heads):
        scores = torch.bmm(grouped[:, head], k[:, :, head].transpose(1, 2))
        probabilities = scores.masked_fill_(group.hidden[:, None], -torch.inf).softmax(dim=-1)
        out[:, head] = torch.bmm(probabilities, v[:, :, head])
    return out.view(sequences, heads, head_dim).to(q.dtype)


def _prefill_rows(sequence: SequenceRows, page_tokens: int, window: int | None) -> PrefillRows:
    visible = _visible_pages(sequence, page_tokens, window)
    return PrefillRows(
        row_start=sequence.row_start,
        row_stop=sequence.row_stop,
        first_position=sequence.context_tokens,
        page_position=visible.start * page_tokens,
        pages=sequence.page_table[visible.start : visible.stop],
    )


def _prefill(q: Tensor, kv: Tensor, rows: PrefillRows, window: int | None) -> Tensor:
    """The rows of one sequence: q [rows, heads, head_dim] to [rows, heads, head_dim]."""
    total = rows.first_position + len(q)
    seen = total - rows.page_position
    k, v = (_read(kv, rows.pages, half)[:seen].transpose(0, 1)[None] for half in (0, 1))
    mask = None
    if rows.first_position or (window is not None and window < total):
        # Row i is at position first_position + i, column j of K at page_position + j.
        own = rows.first_position - rows.page_position
        mask = torch.ones(len(q), seen, dtype=torch.bool, device=q.device).tril_(own)
        if window is not None:
            mask.triu_(own + 1 - window)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)
