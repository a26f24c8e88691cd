"""Stream memory operations of the CUDA driver on the memory that the engine shares with its workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import driver

_EQUAL = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
# With a memory barrier before it.
_ORDERED = int(driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT)


class DriverFlags:
    """See StreamFlags. The flags are within one range of host memory that is registered with CUDA."""

    def __init__(self, address: int, device: torch.device) -> None:
        """``address`` is where the range begins on the host; offsets count from there. Raises RuntimeError."""
        self._device = device
        self._base = int(_checked(driver.cuMemHostGetDevicePointer(address, 0))[0])

    def write(self, offset_bytes: int, value: int) -> None:
        """Raises RuntimeError when the driver refuses."""
        _checked(driver.cuStreamWriteValue32(self._stream, self._base + offset_bytes, value, _ORDERED))

    def wait(self, offset_bytes: int, value: int) -> None:
        """Raises RuntimeError when the driver refuses."""
        _checked(driver.cuStreamWaitValue32(self._stream, self._base + offset_bytes, value, _EQUAL))

    def mark(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        query: Callable[[], bool] = event.query
        return query

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    @property
    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned behind its status. Raises RuntimeError with the name of an error."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answers {status.name}")
    return tuple(values)
