"""Attention of recorded batches through FlashInfer: the plan of each run lies where the graph looks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from flashinfer.page import append_paged_kv_cache
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from segue.engine.cuda.batch_inputs import BatchInputs
from segue.engine.cuda.batch_shapes import PLAN_BYTES, BatchShape, workspace_bytes
from segue.engine.memory.pool import PagePool


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


class GraphAttention:
    """See AttentionStep; for CUDA graphs. All that changes from run to run lies in ``inputs`` and in the plan.

    One kernel serves rows that decode and rows of prompts: how many query rows it takes at a time follows from the
    rows that a sequence of this shape may have.
    """

    def __init__(
        self,
        pool: PagePool,
        windows: Sequence[int | None],
        heads: int,
        workspace: Tensor,
        plans: Mapping[int | None, PlanMemory],
        inputs: BatchInputs,
    ) -> None:
        """``windows`` has each layer's. ``workspace`` uint8 is for partial results, of one launch after the other."""
        self._pool = pool
        self._windows = tuple(windows)
        self._heads = heads
        self._plans = plans
        self._inputs = inputs
        self._wrappers = {window: self._wrapper(window, workspace) for window in set(windows)}

    def plan(self) -> None:
        """Divide the work of the inputs, which are filled and on their way to the device.

        All runs but the last must have ended. This is what ``wrapper.plan`` does, without its own copies of the inputs.
        """
        host, shape, pool = self._inputs.host, self._inputs.shape, self._pool
        for window, wrapper in self._wrappers.items():
            wrapper._plan_info = wrapper._cached_module.plan(
                wrapper._float_workspace_buffer,
                wrapper._int_workspace_buffer,
                self._plans[window].turn(),
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
                -1,  # No fixed size of the parts that KV is split into,
                False,  # and it may be split.
                0,
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv, at = self._pool.kv(layer), self._inputs.on_device
        append_paged_kv_cache(k, v, at.sequence_of_row, at.positions, kv, at.indices, at.indptr, at.last_page_tokens)
        out: Tensor = self._wrappers[self._windows[layer]].run(q, kv, out=torch.empty_like(q))
        return out

    def close(self) -> None:
        """It is used again."""

    def _wrapper(self, window: int | None, workspace: Tensor) -> BatchPrefillWithPagedKVCacheWrapper:
        """A wrapper that reads the inputs' buffers and has been planned once, for as many rows as the shape has."""
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
        wrapper._int_workspace_buffer = self._plans[window].on_device
        row_indptr = torch.full((shape.sequences + 1,), shape.rows, dtype=torch.int32)
        row_indptr[0] = 0
        wrapper.plan(
            row_indptr,
            torch.arange(shape.sequences + 1, dtype=torch.int32),
            torch.full((shape.sequences,), pool.padding_page, dtype=torch.int32),
            torch.ones(shape.sequences, dtype=torch.int32),
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


class RecordedAttention:
    """Attention of recorded batches of these shapes, which share all memory, since one runs after the other."""

    def __init__(self, pool: PagePool, windows: Sequence[int | None], heads: int, shapes: Iterable[BatchShape]) -> None:
        """``windows`` has each layer's."""
        device = pool.data.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        size_bytes = max(workspace_bytes(shape, heads, pool.kv_heads, pool.head_dim, processors) for shape in shapes)
        self._pool = pool
        self._windows = tuple(windows)
        self._heads = heads
        self._workspace = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self._plans = {window: PlanMemory(device) for window in set(windows)}

    def begin(self, inputs: BatchInputs) -> GraphAttention:
        """The attention of the batches that these inputs bring."""
        return GraphAttention(self._pool, self._windows, self._heads, self._workspace, self._plans, inputs)
