"""Attention of recorded batches through FlashInfer: the plan of each run lies where the graph looks for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from segue.engine.cuda.batch_inputs import BatchInputs
from segue.engine.cuda.batch_shapes import PLAN_BYTES, AttentionKind, BatchShape, prompt_tiles, workspace_bytes
from segue.engine.memory.pool import PagePool
from segue.gpu_kernels.rope_kv import rotate_and_store

# Of FlashInfer; both have `run`, and what `plan` leaves behind.
_Wrapper: TypeAlias = BatchPrefillWithPagedKVCacheWrapper | BatchDecodeWithPagedKVCacheWrapper


def window_left(window: int | None) -> int:
    """FlashInfer's name for a window: how many tokens before itself a row sees; -1 for all."""
    return -1 if window is None else window - 1


class PlanMemory:
    """Where the plans of all shapes lie, since one batch runs after the other: on the device, and in pinned memory.

    A plan goes to the device through pinned memory, which the copy of the plan before may still read: two take turns.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=device)
        self._pinned = [torch.empty(PLAN_BYTES, dtype=torch.uint8).pin_memory() for _ in range(2)]

    def turn(self) -> Tensor:
        """The pinned memory for the next plan. All runs but the last must have ended."""
        self._pinned.reverse()
        return self._pinned[0]


class GraphAttention(ABC):
    """See AttentionStep; for CUDA graphs. All that changes from run to run lies in ``inputs`` and in the plan."""

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        heads: int,
        table: Tensor,
        workspace: Tensor,
        plans: Mapping[int | None, PlanMemory],
        inputs: BatchInputs,
    ) -> None:
        """``windows`` has each layer's, ``table`` the cosines and sines of all positions. ``workspace`` uint8 is for
        partial results, of one launch after the other."""
        self._pool = pool
        self._windows = tuple(windows)
        self._heads = heads
        self._table = table
        self._plans = plans
        self._inputs = inputs
        self._wrappers = {window: self._planned(window, workspace) for window in set(windows)}

    def plan(self) -> None:
        """Divide the work of the inputs, which are filled and on their way to the device.

        All runs but the last must have ended. This is what ``wrapper.plan`` does, without its own copies of the inputs.
        """
        for window, wrapper in self._wrappers.items():
            pinned = self._plans[window].turn()
            self._clear(pinned)
            wrapper._plan_info = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer, wrapper._int_workspace_buffer, pinned, *self._work(window)
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv, at = self._pool.kv(layer), self._inputs.on_device
        rotate_and_store(q, k, v, at.positions, at.slots, self._table, kv)
        out: Tensor = self._wrappers[self._windows[layer]].run(q, kv, out=torch.empty_like(q))
        return out

    def close(self) -> None:
        """It is used again."""
        return

    def _planned(self, window: int | None, workspace: Tensor) -> _Wrapper:
        wrapper = self._wrapper(window, workspace)
        wrapper._int_workspace_buffer = self._plans[window].on_device
        return wrapper

    def _clear(self, pinned: Tensor) -> None:  # noqa: ARG002
        """Prepare the memory of a plan for what the plan leaves as it is."""
        return

    @abstractmethod
    def _wrapper(self, window: int | None, workspace: Tensor) -> _Wrapper:
        """One that reads the inputs' buffers and has been planned once, for as many rows as the shape has."""

    @abstractmethod
    def _work(self, window: int | None) -> tuple[object, ...]:
        """What the plan of the wrapper's module takes behind its memory."""


class PromptAttention(GraphAttention):
    """Sequences of any number of rows; how many query rows the kernel takes at a time follows from the shape.

    ``splits`` divides long KV among programs, whose results another launch then merges.
    """

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        heads: int,
        table: Tensor,
        workspace: Tensor,
        plans: Mapping[int | None, PlanMemory],
        inputs: BatchInputs,
        *,
        splits: bool,
    ) -> None:
        self._splits = splits
        super().__init__(pool, windows, heads, table, workspace, plans, inputs)

    def _wrapper(self, window: int | None, workspace: Tensor) -> _Wrapper:
        at, shape, pool = self._inputs.on_device, self._inputs.shape, self._pool
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=at.row_indptr,
            paged_kv_indptr_buf=at.indptr,
            paged_kv_indices_buf=at.indices,
            paged_kv_last_page_len_buf=at.last_page_tokens,
            backend="fa2",
        )
        row_indptr = torch.full((shape.sequences + 1,), shape.rows, dtype=torch.int32)
        row_indptr[0] = 0
        wrapper.plan(
            row_indptr,
            *_one_page_each(shape, pool.padding_page),
            self._heads,
            pool.kv_heads,
            pool.head_dim,
            pool.page_tokens,
            causal=True,
            window_left=window_left(window),
            q_data_type=pool.dtype,
            kv_data_type=pool.dtype,
        )
        return wrapper

    def _clear(self, pinned: Tensor) -> None:
        """Programs for which there is no work must find some: where KV is not split, nothing tells them that.

        The plan begins with the sequence of each program, then the tile of its rows, each list a multiple of 16 bytes.
        They get the first tile of the last sequence, which has no rows, or else, in a full batch, is made once more.
        """
        if self._splits:
            return
        shape, pool = self._inputs.shape, self._pool
        processors = torch.cuda.get_device_properties(pool.data.device).multi_processor_count
        _, programs = prompt_tiles(shape, self._heads, pool.kv_heads, pool.head_dim, processors)
        list_elems = -(-programs // 4) * 4
        lists = pinned[: 8 * list_elems].view(torch.int32)
        lists[:list_elems] = shape.sequences - 1
        lists[list_elems:] = 0

    def _work(self, window: int | None) -> tuple[object, ...]:
        host, shape, pool = self._inputs.host, self._inputs.shape, self._pool
        return (
            host.row_indptr,
            host.indptr,
            self._inputs.total_tokens,
            shape.rows,
            shape.sequences,
            self._heads,
            pool.kv_heads,
            pool.page_tokens,
            True,  # For a graph: sizes and places depend on the shape alone.
            pool.head_dim,
            pool.head_dim,
            True,  # Causal.
            window_left(window),
            -1,  # No fixed size of the parts that KV is split into.
            not self._splits,
            0,
        )


class DecodeAttention(GraphAttention):
    """One row of each sequence, without tensor cores: time is the bytes of the KV."""

    def _wrapper(self, window: int | None, workspace: Tensor) -> _Wrapper:
        at, shape, pool = self._inputs.on_device, self._inputs.shape, self._pool
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            paged_kv_indptr_buffer=at.indptr,
            paged_kv_indices_buffer=at.indices,
            paged_kv_last_page_len_buffer=at.last_page_tokens,
            backend="fa2",
        )
        wrapper.plan(
            *_one_page_each(shape, pool.padding_page),
            self._heads,
            pool.kv_heads,
            pool.head_dim,
            pool.page_tokens,
            window_left=window_left(window),
            q_data_type=pool.dtype,
            kv_data_type=pool.dtype,
        )
        return wrapper

    def _work(self, window: int | None) -> tuple[object, ...]:
        pool = self._pool
        # Their dtypes are what counts.
        empty = torch.empty(0, dtype=pool.dtype)
        return (
            self._inputs.host.indptr,
            self._inputs.shape.sequences,
            self._heads,
            pool.kv_heads,
            pool.page_tokens,
            True,  # For a graph.
            window_left(window),
            0.0,  # No soft cap.
            pool.head_dim,
            pool.head_dim,
            empty,
            empty,
        )


class RecordedAttention:
    """Attention of recorded batches of these shapes, which share all memory, since one runs after the other."""

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        heads: int,
        table: Tensor,
        shapes: Iterable[BatchShape],
    ) -> None:
        """``windows`` has each layer's, ``table`` the cosines and sines of all positions."""
        device = pool.data.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        size_bytes = max(workspace_bytes(shape, heads, pool.kv_heads, pool.head_dim, processors) for shape in shapes)
        self._pool = pool
        self._windows = tuple(windows)
        self._heads = heads
        self._table = table
        self._workspace = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        self._plans = {window: PlanMemory(device) for window in set(windows)}

    def begin(self, inputs: BatchInputs, kind: AttentionKind) -> GraphAttention:
        """The attention of the batches that these inputs bring."""
        parts = self._pool, self._windows, self._heads, self._table, self._workspace, self._plans, inputs
        if kind is AttentionKind.ROWS:
            return DecodeAttention(*parts)
        return PromptAttention(*parts, splits=kind is AttentionKind.SPLIT)


def _one_page_each(shape: BatchShape, padding_page: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pages of sequences that have one token each: bounds, pages, and how many tokens the last one holds."""
    return (
        torch.arange(shape.sequences + 1, dtype=torch.int32),
        torch.full((shape.sequences,), padding_page, dtype=torch.int32),
        torch.ones(shape.sequences, dtype=torch.int32),
    )
