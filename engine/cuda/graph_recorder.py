"""Passes recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Which of cuBLAS's two interfaces chooses the faster kernels, by rows: measured on an H200, docs/notes-cuda-engine.md.
_LT_ROWS = range(17, 257)


class GraphRecorder:
    """See Recorder. Graphs of one recorder share a pool of memory and cuBLAS's workspace, since one runs after the
    other; those of another may run beside them."""

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        # torch gives cuBLAS a workspace for each stream, and graphs keep that of the stream that they were recorded on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, run: Callable[[], None], rows: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with _blas_for(rows):
            run()
            torch.cuda.synchronize()
            # Not by torch.cuda.graph, which gives all unused memory back first: for each layer that takes longer than
            # recording it. Other threads go on copying meanwhile.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        return graph.replay


@contextmanager
def _blas_for(rows: int) -> Iterator[None]:
    """Have torch call the interface of cuBLAS that is faster for so many rows."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt" if rows in _LT_ROWS else "cublas")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
