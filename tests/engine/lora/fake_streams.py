"""A device in the host's memory whose streams do their work when they are told, in any order that events allow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from segue.engine.device import StreamSpan

PATIENCE_SECONDS = 20.0


class FakeStream:
    """Work in one order."""

    def __init__(self) -> None:
        self.work: deque[FakeWork] = deque()


class FakeMark:
    """The event before a piece of work: all work takes a millisecond."""

    def elapsed_time(self, _ended: object) -> float:
        return 1.0


class FakeWork(FakeMark):
    """A piece of a stream's work; it stands for the event recorded behind it as well."""

    def __init__(
        self, device: FakeStreams, stream: FakeStream, run: Callable[[], object], after: tuple[FakeWork, ...]
    ) -> None:
        self.after = after
        self.is_done = False
        self.error: Exception | None = None
        self._device = device
        self._stream = stream
        self._run = run

    def query(self) -> bool:
        if self.is_done and self.error is not None:
            raise self.error
        return self.is_done

    def synchronize(self) -> None:
        """Wait until it has been done; where the device is driven by who waits, do what comes before, and it."""
        device = self._device
        with device.changed:
            waits = device.changed.wait_for(lambda: self.is_done or device.driven_by_waiting, PATIENCE_SECONDS)
            assert waits, "the device was never told to go on"
            while not self.is_done:
                first = self._stream.work[0]
                for other in first.after:
                    other.synchronize()
                first.finish()
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        assert self._stream.work[0] is self
        assert all(other.is_done for other in self.after), "work was done before what it waits for"
        with torch.inference_mode():
            self._run()
        self._stream.work.popleft()
        self.is_done = True
        self._device.changed.notify_all()


class FakeStreams:
    """See DeviceStreams. The streams go on when ``go_on`` is called; or, ``driven_by_waiting``, whenever the host waits
    for one of their events.

    ``before_work(stream)`` is called whenever work is enqueued, and what it returns before that is done.
    """

    device = torch.device("cpu")
    work_beside = True

    def __init__(self, staging_slots: int = 2, *, driven_by_waiting: bool = False) -> None:
        self.staging_slots = staging_slots
        self.driven_by_waiting = driven_by_waiting
        self.changed = threading.Condition()
        self.loop, self.copying, self.landing = FakeStream(), FakeStream(), FakeStream()
        self.fences: list[FakeWork] = []
        self.before_work: Callable[[FakeStream], Callable[[], None]] = lambda _: lambda: None

    def register_host(self, address: int, size_bytes: int) -> None:
        raise AssertionError(f"nothing is registered in these tests: {size_bytes} bytes at {address:#x}")

    def unregister_host(self, address: int) -> None:
        raise AssertionError(f"nothing has been registered at {address:#x}")

    def fence(self) -> torch.cuda.Event:
        self.fences.append(self._enqueue(self.loop, lambda: None, ()))
        return cast("torch.cuda.Event", self.fences[-1])

    def upload(self, words: Tensor) -> Tensor:
        """The words are not there before the loop's stream has brought them."""
        there = torch.full_like(words, -(1 << 40))
        self._enqueue(self.loop, lambda: there.copy_(words), ())
        return there

    def staging(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), 0xFF, dtype=torch.uint8)

    def enqueue_copy(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> StreamSpan:
        ended = self._enqueue(self.copying, work, after)
        return StreamSpan(cast("torch.cuda.Event", FakeMark()), cast("torch.cuda.Event", ended))

    def enqueue_landing(self, work: Callable[[], None], after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        return cast("torch.cuda.Event", self._enqueue(self.landing, work, after))

    def go_on(self, stream: FakeStream) -> bool:
        """Do the next piece of a stream's work, if there is one and nothing that it waits for is missing."""
        with self.changed:
            if not stream.work or not all(other.is_done for other in stream.work[0].after):
                return False
            stream.work[0].finish()
            return True

    def go_on_as_far_as_possible(self) -> None:
        """All that is enqueued."""
        while any(self.go_on(stream) for stream in (self.loop, self.copying, self.landing)):
            pass

    def run_free(self) -> None:
        """From now on nobody has to tell it."""
        with self.changed:
            self.driven_by_waiting = True
            self.changed.notify_all()

    def _enqueue(self, stream: FakeStream, work: Callable[[], object], after: Iterable[torch.cuda.Event]) -> FakeWork:
        before = self.before_work(stream)

        def run() -> None:
            before()
            work()

        with self.changed:
            enqueued = FakeWork(self, stream, run, tuple(cast("FakeWork", event) for event in after))
            stream.work.append(enqueued)
        return enqueued
