"""Passes recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Which of cuBLAS's two interfaces chooses the faster kernels, by rows: measured on an H200, docs/notes-cuda-engine.md.
_LT_ROWS = range(17, 257)


class GraphRecorder:
    """See Recorder. Graphs share one pool of memory, since they never run at once."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None], rows: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with _blas_for(rows):
            run()
            torch.cuda.synchronize()
            # Other threads go on copying meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                run()
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
