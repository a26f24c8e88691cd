"""Where the bytes of a checkpoint go: into host tensors in place, or through pinned buffers to a device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
from torch import Tensor


class Landing(Protocol):
    """Brings stored values into tensors. ``buffer`` is called by several threads at once."""

    def buffer(self, destination: Tensor, stored: torch.dtype) -> AbstractContextManager[memoryview]:
        """Memory for the stored values of ``destination`` [n], n x the item size of ``stored`` bytes.

        When the block is left they are on their way, converted to the destination's dtype. Where it raises, nothing is
        written, except that a buffer may be the destination's own memory.
        """
        ...

    def finish(self) -> None:
        """Wait until everything has arrived."""
        ...


class HostLanding:
    """Destinations on the CPU: read in place, or converted from a buffer when the dtypes differ."""

    def __init__(self) -> None:
        self._buffers = _HostBuffers()

    @contextmanager
    def buffer(self, destination: Tensor, stored: torch.dtype) -> Iterator[memoryview]:
        if destination.dtype is stored:
            yield _memory_of(destination)
            return
        with self._buffers.taken(destination.numel(), stored) as values:
            yield _memory_of(values)
            destination.copy_(values)

    def finish(self) -> None:
        """Everything has arrived already."""


class Comparison:
    """Writes nothing: compares what is stored with what destinations on any device hold."""

    def __init__(self) -> None:
        self.differs = False
        self._buffers = _HostBuffers()

    @contextmanager
    def buffer(self, destination: Tensor, stored: torch.dtype) -> Iterator[memoryview]:
        with self._buffers.taken(destination.numel(), stored) as values:
            yield _memory_of(values)
            if not torch.equal(values.to(destination), destination):
                self.differs = True

    def finish(self) -> None:
        """Every comparison is done when its block is left."""


class DeviceLanding:
    """Destinations on a CUDA device: a ring of pinned buffers, copied on a stream of their own.

    What has another dtype is converted on the device. A buffer is read into while others are copied, and again once the
    event behind its copy has come.
    """

    def __init__(self, device: torch.device, *, buffers: int, buffer_bytes: int) -> None:
        # Where the bytes of another dtype lie until they are converted. The stream's order keeps one from the next.
        self._raw = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The destinations' memory may have been another tensor's, with work on it still enqueued.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._enqueueing = threading.Lock()
        self._ring: SimpleQueue[_Staged] = SimpleQueue()
        for _ in range(buffers):
            self._ring.put(_Staged(buffer_bytes))

    @contextmanager
    def buffer(self, destination: Tensor, stored: torch.dtype) -> Iterator[memoryview]:
        staged = self._ring.get()
        try:
            staged.copied.synchronize()
            values = staged.pinned[: destination.numel() * stored.itemsize].view(stored)
            yield _memory_of(values)
            with self._enqueueing, torch.cuda.stream(self._stream):
                if destination.dtype is stored:
                    destination.copy_(values, non_blocking=True)
                else:
                    raw = self._raw[: values.nbytes].view(stored)
                    raw.copy_(values, non_blocking=True)
                    destination.copy_(raw)
                staged.copied.record(self._stream)
        finally:
            self._ring.put(staged)

    def finish(self) -> None:
        self._stream.synchronize()


class _Staged:
    """A pinned buffer, and the event behind its last copy."""

    def __init__(self, size_bytes: int) -> None:
        self.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _HostBuffers:
    """Buffers for several threads. One that is given back is taken again: fresh memory costs more than the read."""

    def __init__(self) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()

    @contextmanager
    def taken(self, count: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor [count] whose values are whatever they are."""
        size_bytes = count * dtype.itemsize
        try:
            buffer = self._free.get_nowait()
        except Empty:
            buffer = torch.empty(0, dtype=torch.uint8)
        if buffer.numel() < size_bytes:
            buffer = torch.empty(size_bytes, dtype=torch.uint8)
        try:
            yield buffer[:size_bytes].view(dtype)
        finally:
            self._free.put(buffer)


def _memory_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    memory: memoryview = values.view(torch.uint8).numpy().data
    return memory
