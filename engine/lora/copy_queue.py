"""The copies that wait for the link, in the order in which their layers are needed."""

from __future__ import annotations

import heapq
import threading

from segue.engine.lora.transfer import CopyJob, CopyLoad

# What one copy brings at most: the link is through with it in about a millisecond.
GROUP_BYTES = 64 << 20
_TAIL_SHARES = 3
# The needs of passes begin at 1.
_BEFORE_ALL = 0.0


class CopyQueue:
    """Loads of which layers are in host memory and wait for their copies.

    First what passes wait for, in the order in which those began; of one pass the next layer of each load before the
    one after it of any. Then what none waits for yet, one load after the other. A load's layers stay in order.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[tuple[float, int, int], int, CopyLoad]] = []
        self._pushes = 0
        self._waiting = 0
        self._ended = False

    def put(self, load: CopyLoad, ready: int) -> None:
        """The load's layers below ``ready`` are in host memory."""
        with self._changed:
            was_waiting = load.taken < load.ready
            load.ready = ready
            if not was_waiting:
                self._waiting += 1
                self._push(load)
            self._changed.notify()

    def end(self) -> None:
        """``get`` returns no more jobs."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def hasten(self, load: CopyLoad, need: float) -> None:
        """A pass waits for a load's layers, those to come among them: see ``CopyLoad``."""
        with self._changed:
            load.need = need
            self._push(load)

    def cancel(self, load: CopyLoad) -> None:
        """Nobody wants a load any more: what waits of it is given out before all else, to be told of as ended."""
        with self._changed:
            load.is_cancelled = True
            load.need = _BEFORE_ALL
            self._push(load)

    @property
    def is_needed(self) -> bool:
        """Whether a pass waits for the next job."""
        with self._changed:
            load = self._first()
            return load is not None and load.is_needed

    def get(self) -> CopyJob | None:
        """The next layer, when there is one."""
        with self._changed:
            while not self._ended:
                load = self._first()
                if load is not None:
                    return self._take(load, 1)
                self._changed.wait()
            return None

    def take_cancelled(self) -> CopyJob | None:
        """All that waits of a load that is cancelled, if that is the next."""
        with self._changed:
            load = self._first()
            return self._take(load, load.ready - load.taken) if load is not None and load.is_cancelled else None

    def take_group(self, short_bytes: int) -> CopyJob | None:
        """The next layers that one copy brings, if there are any.

        They are no more than twice those that came before them, since a copy of a layer takes about half of the layer's
        time in a pass, or less; and of a load that is alone no more than a third of what is left, so that the pass has
        little to do when the last of them have landed. But ``short_bytes``, for which the first of them may wait, are
        never too many, and GROUP_BYTES are the most.
        """
        with self._changed:
            load = self._first()
            if load is None:
                return None
            most_bytes = self._most_bytes(load)
            size_bytes = load.layers[load.taken].host_bytes
            count = 1
            while load.taken + count < load.ready:
                size_bytes += load.layers[load.taken + count].host_bytes
                is_late = count >= 2 * load.taken or size_bytes > most_bytes
                if size_bytes > GROUP_BYTES or (is_late and size_bytes > short_bytes):
                    break
                count += 1
            return self._take(load, count)

    def _most_bytes(self, load: CopyLoad) -> int:
        if self._waiting > 1:
            return GROUP_BYTES
        last = load.layers[-1]
        return (last.host_start + last.host_bytes - load.layers[load.taken].host_start) // _TAIL_SHARES

    def _key(self, load: CopyLoad) -> tuple[float, int, int]:
        if load.is_needed:
            return load.need, load.taken, load.arrival
        return load.need, load.arrival, load.taken

    def _push(self, load: CopyLoad) -> None:
        if load.taken < load.ready:
            self._pushes += 1
            heapq.heappush(self._heap, (self._key(load), self._pushes, load))

    def _first(self) -> CopyLoad | None:
        while self._heap:
            key, _, load = self._heap[0]
            if load.taken < load.ready and self._key(load) == key:
                return load
            heapq.heappop(self._heap)
        return None

    def _take(self, load: CopyLoad, count: int) -> CopyJob:
        first = load.taken
        load.taken += count
        if load.taken == load.ready:
            self._waiting -= 1
        self._push(load)
        return CopyJob(load=load, first_layer=first, layers=load.layers[first : first + count])
