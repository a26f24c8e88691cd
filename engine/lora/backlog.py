"""The copies that the link has before it, and when each layer will be through."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from segue.engine.lora.states import DeviceCopy
from segue.engine.rate import RateMeter

# What is late may come at any time, but it has not.
_SOON_SECONDS = 1e-6


class CopyBacklog:
    """Copies in the order in which the link takes them, which is that in which they were put."""

    def __init__(self, rate: RateMeter, clock: Callable[[], float] = time.monotonic) -> None:
        """``rate`` is the link's, in bytes per second."""
        self._rate = rate
        self._clock = clock
        # For each load its layers under way, in order: all bytes ever put, up to the layer's last.
        self._through: dict[DeviceCopy, deque[int]] = {}
        self._put_bytes = 0
        self._ended_bytes = 0
        self._busy_since = 0.0

    @property
    def loads(self) -> int:
        """Loads with copies under way."""
        return len(self._through)

    def put(self, load: DeviceCopy, copy_bytes: int) -> None:
        """The next layer of a load is to be copied."""
        if not self._through:
            self._busy_since = self._clock()
        self._put_bytes += copy_bytes
        self._through.setdefault(load, deque()).append(self._put_bytes)

    def end(self, load: DeviceCopy, copy_bytes: int, now: float) -> None:
        """The first layer under way of a load has landed, or will not."""
        self._ended_bytes += copy_bytes
        self._busy_since = now
        layers = self._through[load]
        layers.popleft()
        if not layers:
            del self._through[load]

    def landing_seconds(self, load: DeviceCopy) -> Sequence[float]:
        """When each of the load's layers under way will be through, in seconds from now."""
        under_way_seconds = self._clock() - self._busy_since
        return [self._left(through, under_way_seconds) for through in self._through.get(load, ())]

    def busy_seconds(self) -> float:
        """For how long the link has copies to do."""
        return self._left(self._put_bytes, self._clock() - self._busy_since) if self._through else 0.0

    def check(self) -> None:
        """Raises AssertionError unless what is under way is what was put and has not ended."""
        assert self._ended_bytes <= self._put_bytes, f"{self._ended_bytes} bytes ended, {self._put_bytes} were put"
        assert self._through or self._ended_bytes == self._put_bytes, "bytes of no load are under way"
        for layers in self._through.values():
            assert layers, "a load without layers is under way"
            assert list(layers) == sorted(layers), "a load's layers are out of order"

    def _left(self, through_bytes: int, under_way_seconds: float) -> float:
        seconds = self._rate.seconds_for(through_bytes - self._ended_bytes) - under_way_seconds
        return max(seconds, _SOON_SECONDS)
