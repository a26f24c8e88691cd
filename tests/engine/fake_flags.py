"""A stream that runs what is enqueued at once, for the CPU: its flags are those that real workers see."""

from __future__ import annotations

import time
from collections.abc import Callable

from segue.cpu_lora import SharedMemory
from segue.cpu_lora.atomics import observe, publish

_PATIENCE_SECONDS = 30.0


class FakeFlags:
    """See StreamFlags.

    While ``is_late`` no mark is passed. ``on_write`` and ``on_wait`` are called before each of these operations.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory
        self.is_late = False
        self.on_write: Callable[[], None] = lambda: None
        self.on_wait: Callable[[], None] = lambda: None

    def write(self, offset_bytes: int, value: int) -> None:
        self.on_write()
        publish(self._memory.words, offset_bytes // 4, value)

    def wait(self, offset_bytes: int, value: int) -> None:
        self.on_wait()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while observe(self._memory.words, offset_bytes // 4) != value:
            assert time.monotonic() < deadline, "the stream hangs"
            time.sleep(0)

    def mark(self) -> Callable[[], bool]:
        return lambda: not self.is_late

    def synchronize(self) -> None:
        """All has been done."""
