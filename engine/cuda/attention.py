"""Attention over the pool's pages through FlashInfer (Ye et al., 2025, arXiv:2501.01005)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from flashinfer.page import append_paged_kv_cache
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from segue.engine.batch import RowBatch
from segue.engine.cuda.batch_shapes import ATTENTION_BYTES
from segue.engine.cuda.graph_attention import window_left
from segue.engine.memory.pool import PagePool

SERVED_HEAD_DIMS = (64, 128, 256)
SERVED_DTYPES = (torch.float16, torch.bfloat16)

_Wrappers: TypeAlias = dict[int | None, BatchPrefillWithPagedKVCacheWrapper]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageIndices:
    """Where each sequence's KV lies, int32: ``indices[indptr[i] : indptr[i + 1]]`` are the pages of sequence i, and its
    last one holds ``last_page_tokens[i]`` tokens."""

    indptr: Tensor
    indices: Tensor
    last_page_tokens: Tensor

    @classmethod
    def of(cls, tables: Sequence[Tensor], total_tokens: Sequence[int], page_tokens: int) -> PageIndices:
        """``tables`` may be longer than the sequences' KV."""
        pages = torch.tensor([-(-tokens // page_tokens) for tokens in total_tokens], dtype=torch.int32)
        used = [table[:count] for table, count in zip(tables, pages.tolist(), strict=True)]
        return cls(
            indptr=torch.nn.functional.pad(pages.cumsum(0, dtype=torch.int32), (1, 0)),
            indices=torch.cat(used).to(torch.int32),
            last_page_tokens=torch.tensor([(tokens - 1) % page_tokens + 1 for tokens in total_tokens]).int(),
        )

    def to(self, device: torch.device) -> PageIndices:
        """The same on ``device``."""
        return PageIndices(
            indptr=self.indptr.to(device),
            indices=self.indices.to(device),
            last_page_tokens=self.last_page_tokens.to(device),
        )


class FlashInferAttention:
    """See AttentionBackend. Serves 16-bit dtypes and head dims of 64, 128 or 256.

    A batch that is under way keeps its plan in wrappers of its own, which serve a later batch when it is closed.
    """

    def __init__(self, pool: PagePool, windows: Sequence[int | None], heads: int) -> None:
        self._pool = pool
        self._heads = heads
        self._windows = tuple(windows)
        self._idle: list[tuple[torch.cuda.Event, _Wrappers]] = []

    def begin(self, batch: RowBatch) -> FlashInferStep:
        """Plan a batch of any rows."""
        device = self._pool.data.device
        wrappers = self._take_wrappers()
        pages = PageIndices.of(
            [item.page_table for item in batch.sequences],
            [item.total_tokens for item in batch.sequences],
            self._pool.page_tokens,
        )
        rows = torch.tensor([item.rows for item in batch.sequences], dtype=torch.int32)
        row_indptr = torch.nn.functional.pad(rows.cumsum(0, dtype=torch.int32), (1, 0))
        for window, wrapper in wrappers.items():
            wrapper.plan(
                row_indptr,
                pages.indptr,
                pages.indices,
                pages.last_page_tokens,
                self._heads,
                self._pool.kv_heads,
                self._pool.head_dim,
                self._pool.page_tokens,
                causal=True,
                window_left=window_left(window),
                q_data_type=self._pool.dtype,
                kv_data_type=self._pool.dtype,
            )
        return FlashInferStep(
            pool=self._pool,
            wrappers=[wrappers[window] for window in self._windows],
            pages=pages.to(device),
            sequence_of_row=torch.repeat_interleave(torch.arange(len(rows)), rows).int().to(device),
            positions=batch.positions.int().to(device),
            give_back=lambda: self._give_back(wrappers),
        )

    def _take_wrappers(self) -> _Wrappers:
        """Some that no work on the device refers to: a plan's way there is through pinned memory of its wrapper."""
        for index, (ended, wrappers) in enumerate(self._idle):
            if ended.query():  # type: ignore[no-untyped-call]
                del self._idle[index]
                return wrappers
        # Partial results of one launch after the other: a batch's wrappers may share them, those of two batches not.
        workspace = torch.zeros(ATTENTION_BYTES, dtype=torch.uint8, device=self._pool.data.device)
        return {
            window: BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
            for window in set(self._windows)
        }

    def _give_back(self, wrappers: _Wrappers) -> None:
        ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ended.record()
        self._idle.append((ended, wrappers))


class FlashInferStep:
    """See AttentionStep."""

    def __init__(
        self,
        *,
        pool: PagePool,
        wrappers: Sequence[BatchPrefillWithPagedKVCacheWrapper],
        pages: PageIndices,
        sequence_of_row: Tensor,
        positions: Tensor,
        give_back: Callable[[], None],
    ) -> None:
        """``wrappers`` has one for each layer, planned. ``sequence_of_row`` and ``positions`` are int32 [rows]."""
        self._pool = pool
        self._wrappers = wrappers
        self._pages = pages
        self._sequence_of_row = sequence_of_row
        self._positions = positions
        self._give_back = give_back

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = self._pool.kv(layer)
        pages = self._pages
        append_paged_kv_cache(
            k, v, self._sequence_of_row, self._positions, kv, pages.indices, pages.indptr, pages.last_page_tokens
        )
        out: Tensor = self._wrappers[layer].run(q, kv)
        return out

    def close(self) -> None:
        self._give_back()
