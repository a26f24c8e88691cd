"""Where the model runs, and what keeps work on its streams in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from segue.config import ConfigError


@dataclass(frozen=True, slots=True)
class StreamSpan:
    """Work of a device's streams: events before and behind it, both recorded."""

    begun: torch.cuda.Event
    ended: torch.cuda.Event

    def seconds(self, behind: torch.cuda.Event | None) -> float:
        """How long it took, of which only what came after ``behind`` counts. Both have been reached."""
        milliseconds: float = self.begun.elapsed_time(self.ended)
        if behind is not None:
            milliseconds = min(milliseconds, behind.elapsed_time(self.ended))
        return milliseconds / 1e3


class DeviceStreams(Protocol):
    """What a device has beside the stream of the engine's loop thread: one stream that copies, and one that lands.

    Work of the loop thread is in one order, so that pages may go from one pass to another as soon as the first is
    enqueued. Weights are copied and landed beside it, enqueued by the loop thread as well or by one beside it.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def work_beside(self) -> bool:
        """Whether they work beside the host, which learns of it by events."""
        ...

    @property
    def staging_slots(self) -> int:
        """How many copies may have been enqueued and not landed before the next one waits for the first of them."""
        ...

    def register_host(self, address: int, size_bytes: int) -> None:
        """Have the device copy from this host memory, whole pages of it, at full speed.

        Raises MemoryError when it cannot.
        """
        ...

    def unregister_host(self, address: int) -> None:
        """The memory that was registered from ``address`` on is about to go."""
        ...

    def fence(self) -> torch.cuda.Event | None:
        """A mark behind all that the calling thread has enqueued so far."""
        ...

    def upload(self, words: Tensor) -> Tensor:
        """A copy of host integers on the device, in the order of what the calling thread enqueues; does not wait."""
        ...

    def staging(self, size_bytes: int) -> Tensor:
        """Memory uint8 [size_bytes] for what ``enqueue_copy`` writes and ``enqueue_landing`` reads.

        It must have been done with on the device before it is dropped.
        """
        ...

    def enqueue_copy(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> StreamSpan | None:
        """Have the copy stream do what ``work`` enqueues, behind ``after`` and all copies before.

        None where it has been done.
        """
        ...

    def enqueue_landing(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> torch.cuda.Event | None:
        """The same on the landing stream: a fresh event recorded behind it."""
        ...


class CpuStreams:
    """On the CPU everything is done when its call returns."""

    device = torch.device("cpu")
    work_beside = False
    staging_slots = 1

    def register_host(self, address: int, size_bytes: int) -> None:
        """The CPU reads all memory alike."""

    def unregister_host(self, address: int) -> None:
        """See ``register_host``."""

    def fence(self) -> None:
        return None

    def upload(self, words: Tensor) -> Tensor:
        return words.clone()

    def staging(self, size_bytes: int) -> Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def enqueue_copy(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> None:  # noqa: ARG002
        work()

    def enqueue_landing(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> None:  # noqa: ARG002
        work()


class CudaStreams:
    """One CUDA device. Raises ConfigError when there is none that torch can use."""

    work_beside = True
    # A copy runs beside the landing of the one before, which may be late behind other kernels.
    staging_slots = 4

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(f"device: is 'cuda', but torch {torch.__version__} finds no CUDA device")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._landing_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

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

    def upload(self, words: Tensor) -> Tensor:
        # torch keeps the pinned memory until the copy has ended, and uses it again.
        return words.pin_memory().to(self.device, non_blocking=True)

    def staging(self, size_bytes: int) -> Tensor:
        # Memory that the loop's stream gave back may still be written there.
        with torch.cuda.stream(self._copy_stream):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def enqueue_copy(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> StreamSpan:
        _wait(self._copy_stream, after)
        with torch.cuda.stream(self._copy_stream):
            begun = _timed_event(self._copy_stream)
            work()
        return StreamSpan(begun, _timed_event(self._copy_stream))

    def enqueue_landing(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        _wait(self._landing_stream, after)
        with torch.cuda.stream(self._landing_stream):
            work()
        return _timed_event(self._landing_stream)


def _wait(stream: torch.cuda.Stream, after: Iterable[torch.cuda.Event]) -> None:
    for event in after:
        stream.wait_event(event)


def _timed_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Recorded."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def device_streams(device: str) -> DeviceStreams:
    """The streams of the device that the configuration names. Raises ConfigError for CUDA where there is none."""
    return CudaStreams() if device == "cuda" else CpuStreams()
