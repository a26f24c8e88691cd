"""The copies that a device has and has not landed yet, as the loop sees them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from segue.engine.lora.transfer import CopyEnded, CopyEnqueued, failure_message


class Landings:
    """Copies in the order in which they land. Nobody sleeps until one does: who has work looks before it goes on."""

    def __init__(self) -> None:
        self.ahead_bytes = 0
        """What the link has before it."""
        self._under_way: deque[CopyEnqueued] = deque()
        self._last: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._under_way)

    def put(self, copy: CopyEnqueued) -> None:
        """One copy more."""
        self.ahead_bytes += copy.job.host_bytes
        self._under_way.append(copy)

    def take_landed(self) -> Iterator[CopyEnded]:
        """Take away what has landed since the last call, or failed."""
        while self._under_way:
            copy = self._under_way[0]
            seconds, failure = 0.0, None
            try:
                if not copy.span.ended.query():  # type: ignore[no-untyped-call]
                    return
                seconds = copy.span.seconds(self._last)
            except Exception as error:  # noqa: BLE001 - whatever it is, the jobs' users must learn that it failed
                failure = failure_message(error, "copied to the device")
            self._under_way.popleft()
            self.ahead_bytes -= copy.job.host_bytes
            self._last = copy.span.ended
            now = time.monotonic()
            yield CopyEnded(
                job=copy.job, landed=failure is None, failure=failure, seconds=seconds, monotonic_seconds=now
            )

    def close(self) -> None:
        """Wait until the device has done all of it: until then it reads the host's memory."""
        while self._under_way:
            self._under_way.popleft().span.ended.synchronize()
        self.ahead_bytes = 0
