"""Where the model runs, and what keeps work on its streams in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from segue.config import ConfigError


class DeviceStreams(Protocol):
    """A device's copy stream beside the stream of the engine's loop thread.

    Work of the loop thread is in one order, so that pages may go from one pass to another as soon as the first is
    enqueued. Copies of weights run beside it, on a thread of their own.
    """

    @property
    def device(self) -> torch.device: ...

    def register_host(self, address: int, size_bytes: int) -> None:
        """Have the device copy from this host memory at full speed. Raises MemoryError when it cannot."""
        ...

    def unregister_host(self, address: int) -> None:
        """The memory is about to go."""
        ...

    def fence(self) -> torch.cuda.Event | None:
        """A mark behind all that the calling thread has enqueued so far."""
        ...

    def copies(self, behind: torch.cuda.Event | None) -> AbstractContextManager[None]:
        """What is enqueued inside runs behind the mark, and has ended when the block is left."""
        ...


class CpuStreams:
    """On the CPU everything is done when its call returns."""

    device = torch.device("cpu")

    def register_host(self, address: int, size_bytes: int) -> None:
        """The CPU reads all memory alike."""

    def unregister_host(self, address: int) -> None:
        """See ``register_host``."""

    def fence(self) -> None:
        return None

    def copies(self, behind: torch.cuda.Event | None) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()


class CudaStreams:
    """One CUDA device. Raises ConfigError when there is none that torch can use."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(f"device: is 'cuda', but torch {torch.__version__} finds no CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def register_host(self, address: int, size_bytes: int) -> None:
        status = torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise MemoryError(f"{size_bytes} bytes of host memory could not be registered with CUDA: {status}")

    def unregister_host(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def fence(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def copies(self, behind: torch.cuda.Event | None) -> Iterator[None]:
        with torch.cuda.stream(self._copy_stream):
            if behind is not None:
                self._copy_stream.wait_event(behind)
            yield
            self._copy_stream.synchronize()


def device_streams(device: str) -> DeviceStreams:
    """The streams of the device that the configuration names. Raises ConfigError for CUDA where there is none."""
    return CudaStreams() if device == "cuda" else CpuStreams()
