"""Attention over the pool's pages through FlashInfer (Ye et al., 2025, arXiv:2501.01005)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from segue.engine.batch import RowBatch
from segue.engine.cuda.batch_shapes import ATTENTION_BYTES
from segue.engine.cuda.graph_attention import window_left
from segue.engine.memory.pool import PagePool
from segue.gpu_kernels.rope_kv import rotate_and_store

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


class FlashInferAttention:
    """See AttentionBackend. Serves 16-bit dtypes and head dims of 64, 128 or 256.

    A batch that is under way keeps its plan in wrappers of its own, which serve a later batch when it is closed.
    """

    def __init__(self, pool: PagePool, windows: Sequence[int | None], heads: int, table: Tensor) -> None:
        """``windows`` has each layer's, ``table`` the cosines and sines of all positions."""
        self._pool = pool
        self._heads = heads
        self._table = table
        self._windows = tuple(windows)
        self._idle: list[tuple[torch.cuda.Event, _Wrappers]] = []

    def begin(self, batch: RowBatch) -> FlashInferStep:
        """Plan a batch of any rows."""
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
            positions=self._to_device(batch.positions),
            slots=self._to_device(batch.slot_pages * self._pool.page_tokens + batch.slot_offsets),
            table=self._table,
            give_back=lambda: self._give_back(wrappers),
        )

    def _to_device(self, values: Tensor) -> Tensor:
        return values.int().pin_memory().to(self._pool.data.device, non_blocking=True)

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
        positions: Tensor,
        slots: Tensor,
        table: Tensor,
        give_back: Callable[[], None],
    ) -> None:
        """``wrappers`` has one for each layer, planned. ``positions`` and ``slots`` are int32 [rows]."""
        self._pool = pool
        self._wrappers = wrappers
        self._positions = positions
        self._slots = slots
        self._table = table
        self._give_back = give_back

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = self._pool.kv(layer)
        rotate_and_store(q, k, v, self._positions, self._slots, self._table, kv)
        out: Tensor = self._wrappers[layer].run(q, kv)
        return out

    def close(self) -> None:
        self._give_back()
