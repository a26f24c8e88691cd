"""The copies that the link has before it, and when each layer will be through."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from segue.engine.lora.transfer import CopyLoad
from segue.engine.rate import RateMeter

# What is late may come at any time, but it has not.
_SOON_SECONDS = 1e-6


@dataclass(slots=True)
class _Load:
    """The bytes of a load's layers under way, in order, and of all of them; ``enqueued_bytes`` are with the device."""

    layers: deque[int] = field(default_factory=deque)
    total_bytes: int = 0
    enqueued_bytes: int = 0


class CopyBacklog:
    """Copies in the order in which ``CopyQueue`` gives them out."""

    def __init__(self, rate: RateMeter, clock: Callable[[], float] = time.monotonic) -> None:
        """``rate`` is the link's, in bytes per second."""
        self._rate = rate
        self._clock = clock
        self._loads: dict[CopyLoad, _Load] = {}
        self._total_bytes = 0
        self._busy_since = 0.0

    @property
    def loads(self) -> int:
        """Loads with copies under way."""
        return len(self._loads)

    def put(self, load: CopyLoad, layers: Sequence[int]) -> None:
        """The next layers of a load, of so many bytes each, are to be copied."""
        if not self._loads:
            self._busy_since = self._clock()
        own = self._loads.setdefault(load, _Load())
        own.layers.extend(layers)
        copy_bytes = sum(layers)
        own.total_bytes += copy_bytes
        self._total_bytes += copy_bytes

    def enqueue(self, load: CopyLoad, copy_bytes: int) -> None:
        """The device has so many more bytes of a load, whatever is asked for later."""
        self._loads[load].enqueued_bytes += copy_bytes

    def end(self, load: CopyLoad, layers: int, now: float) -> None:
        """The first layers under way of a load have landed, or will not."""
        self._busy_since = now
        own = self._loads[load]
        copy_bytes = sum(own.layers.popleft() for _ in range(layers))
        own.total_bytes -= copy_bytes
        own.enqueued_bytes = max(own.enqueued_bytes - copy_bytes, 0)
        self._total_bytes -= copy_bytes
        if not own.layers:
            del self._loads[load]

    def landing_seconds(self, load: CopyLoad) -> Sequence[float]:
        """When each of the load's layers under way will be through, in seconds from now.

        Layers of loads that the same pass waits for are taken as equally large.
        """
        own = self._loads.get(load)
        if own is None:
            return ()
        turns = len(own.layers)
        ahead_bytes = 0
        # By the last of these turns that each other load takes: what it brings in every turn until then.
        until = [0.0] * turns
        for item, other in self._loads.items():
            if other is own:
                continue
            if load.is_needed and item.need == load.need:
                until[min(len(other.layers), turns) - 1] += other.total_bytes / len(other.layers)
            elif (item.need, item.arrival) < (load.need, load.arrival):
                ahead_bytes += other.total_bytes
            else:
                ahead_bytes += other.enqueued_bytes
        others = list(accumulate(reversed(until)))[::-1]
        under_way_seconds = self._clock() - self._busy_since
        through = accumulate(mine + theirs for mine, theirs in zip(own.layers, others, strict=True))
        return [self._left(ahead_bytes + through_bytes, under_way_seconds) for through_bytes in through]

    def busy_seconds(self) -> float:
        """For how long the link has copies to do."""
        return self._left(self._total_bytes, self._clock() - self._busy_since) if self._loads else 0.0

    def check(self) -> None:
        """Raises AssertionError unless the sums are those of the layers under way."""
        for own in self._loads.values():
            assert own.layers, "a load without layers is under way"
            assert own.total_bytes == sum(own.layers), f"{own.total_bytes} bytes of the layers {list(own.layers)}"
            assert 0 <= own.enqueued_bytes <= own.total_bytes, f"{own.enqueued_bytes} of {own.total_bytes} enqueued"
        total_bytes = sum(own.total_bytes for own in self._loads.values())
        assert self._total_bytes == total_bytes, f"{self._total_bytes} bytes under way, not {total_bytes}"

    def _left(self, ahead_bytes: float, under_way_seconds: float) -> float:
        return max(self._rate.seconds_for(round(ahead_bytes)) - under_way_seconds, _SOON_SECONDS)
