"""How long the device computes batches, and how long it waits between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from segue.engine.messages import DeviceTime


class DeviceMeter(Protocol):
    """Measures batches on the loop thread's stream; passes in lanes of their own do not count."""

    def batch(self) -> AbstractContextManager[None]:
        """All that is enqueued inside is one batch."""
        ...

    def read(self) -> DeviceTime:
        """What the batches that have ended took so far."""
        ...


class CpuMeter:
    """By the clock: on the CPU a batch has ended when its calls have returned."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last_end: float | None = None
        self._batches, self._busy_seconds, self._idle_seconds = 0, 0.0, 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        begin = self._clock()
        yield
        end = self._clock()
        if self._last_end is not None:
            self._idle_seconds += begin - self._last_end
        self._last_end = end
        self._busy_seconds += end - begin
        self._batches += 1

    def read(self) -> DeviceTime:
        return DeviceTime(self._batches, self._busy_seconds, self._idle_seconds)


@dataclass(frozen=True, slots=True)
class _Batch:
    """``enqueue_seconds`` is how long the device may have waited for the host behind ``begin``."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    enqueue_seconds: float


class CudaMeter:
    """By events at both ends of a batch. The idle time is an upper bound.

    The first event may pass while the host still prepares what follows. Where the batch before has ended by the time
    that all of this one is enqueued, the time that it took to enqueue counts as idle; where it has not, the device had
    its next work before it needed it. So the bound is close for a batch that is a graph, which starts with the last
    call, and too high for one that is enqueued operation by operation.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last_end: torch.cuda.Event | None = None
        self._under_way: deque[_Batch] = deque()
        self._ended: torch.cuda.Event | None = None
        self._batches, self._busy_seconds, self._idle_seconds = 0, 0.0, 0.0

    @contextmanager
    def batch(self) -> Iterator[None]:
        before = self._last_end
        begin_seconds = self._clock()
        begin = _recorded()
        yield
        late = before is not None and before.query()  # type: ignore[no-untyped-call]
        self._last_end = _recorded()
        self._under_way.append(_Batch(begin, self._last_end, self._clock() - begin_seconds if late else 0.0))
        self._collect()

    def read(self) -> DeviceTime:
        self._collect()
        return DeviceTime(self._batches, self._busy_seconds, self._idle_seconds)

    def _collect(self) -> None:
        while self._under_way and self._under_way[0].end.query():  # type: ignore[no-untyped-call]
            batch = self._under_way.popleft()
            span_seconds = _seconds_between(batch.begin, batch.end)
            waited_seconds = min(batch.enqueue_seconds, span_seconds)
            if self._ended is not None:
                self._idle_seconds += _seconds_between(self._ended, batch.begin) + waited_seconds
            self._busy_seconds += span_seconds - waited_seconds
            self._batches += 1
            self._ended = batch.end


class BatchSpan:
    """One batch on a CUDA device, from its creation to ``close``, in the order of the current stream.

    It begins when the work before has ended, so batches that follow one another share no time, however late the host
    looks at what they brought.
    """

    def __init__(self) -> None:
        self._begin = _recorded()
        self._end: torch.cuda.Event | None = None

    def close(self) -> None:
        """All of the batch has been enqueued."""
        self._end = _recorded()

    def seconds(self) -> float:
        """What the device took; waits until it has ended. Raises ValueError before ``close``."""
        if self._end is None:
            raise ValueError("the batch has not been enqueued as a whole")
        self._end.synchronize()
        return _seconds_between(self._begin, self._end)


def device_meter(device: str) -> DeviceMeter:
    """The meter of the device that the configuration names."""
    return CudaMeter() if device == "cuda" else CpuMeter()


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    milliseconds: float = first.elapsed_time(second)
    return milliseconds * 1e-3
