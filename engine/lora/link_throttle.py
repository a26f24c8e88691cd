"""The link to the device as a budget of bytes: copies of weights and the rows of CPU workers share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class LinkThrottle:
    """A link of ``bytes_per_second`` that carries one transfer after the other, or one without bound (None).

    A token bucket that holds no burst: a transfer ends when those booked before it have ended and its own bytes have
    gone through. Safe for use by several threads.
    """

    def __init__(self, bytes_per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.throttle(bytes_per_second)

    def throttle(self, bytes_per_second: float | None) -> None:
        """Have this bandwidth from now on; what was booked before no longer counts. Raises ValueError."""
        if bytes_per_second is not None and bytes_per_second <= 0:
            raise ValueError(f"bytes_per_second: must be greater than 0, is {bytes_per_second}")
        with self._lock:
            self.bytes_per_second = bytes_per_second
            self._free_seconds = self._rows_free_seconds = self._clock()

    def book_rows(self, row_bytes: int) -> float:
        """Book rows that CPU workers exchange; when they are through, in seconds of the clock. Does not wait.

        Rows share the link half and half with a copy under way: they take twice their time, and the copies booked later
        end later by the rows' bytes. So rows that follow one another without end cannot keep the weights from landing.
        """
        now = self._clock()
        with self._lock:
            if self.bytes_per_second is None:
                return now
            row_seconds = row_bytes / self.bytes_per_second
            shares = 2 if self._free_seconds > now else 1
            self._rows_free_seconds = max(now, self._rows_free_seconds) + shares * row_seconds
            self._free_seconds = max(now, self._free_seconds) + row_seconds
            return self._rows_free_seconds

    def book(self, copy_bytes: int) -> float:
        """Book a transfer behind those booked before; when it ends, in seconds of the clock. Does not wait."""
        now = self._clock()
        with self._lock:
            if self.bytes_per_second is None:
                return now
            self._free_seconds = max(now, self._free_seconds) + copy_bytes / self.bytes_per_second
            return self._free_seconds

    def wait_until(self, end_seconds: float, stopped: threading.Event) -> None:
        """Sleep until the clock shows ``end_seconds`` or ``stopped`` is set."""
        while not stopped.is_set():
            left_seconds = end_seconds - self._clock()
            if left_seconds <= 0:
                return
            stopped.wait(left_seconds)
