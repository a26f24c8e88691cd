"""When workers spin: a counted switch in shared memory."""

from __future__ import annotations

import os
import threading

from segue.cpu_lora.atomics import publish
from segue.cpu_lora.memory import SharedMemory


class Arming:
    """Workers spin while the count is above zero and block on their eventfd otherwise. Thread-safe."""

    def __init__(self, memory: SharedMemory) -> None:
        self._words = memory.words
        self._armed_word = memory.layout.geometry().armed_word
        self._lock = threading.Lock()
        self._count = 0
        self.wake_fds = tuple(
            os.eventfd(0, os.EFD_CLOEXEC) for _ in range(memory.layout.workers)
        )  # one per worker, shared by its successive lives

    @property
    def count(self) -> int:
        """How many holders want the workers awake."""
        return self._count

    def arm(self) -> None:
        """Add a holder; the first wakes the workers."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                publish(self._words, self._armed_word, 1)
                for fd in self.wake_fds:
                    os.eventfd_write(fd, 1)

    def disarm(self) -> None:
        """Remove a holder. Raises RuntimeError when there is none."""
        with self._lock:
            if self._count == 0:
                raise RuntimeError("disarm() without a matching arm()")
            self._count -= 1
            if self._count == 0:
                publish(self._words, self._armed_word, 0)

    def close(self) -> None:
        """Close the eventfds."""
        for fd in self.wake_fds:
            os.close(fd)
        self.wake_fds = ()
