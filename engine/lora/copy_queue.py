"""The copies that wait for the link, in the order in which their layers are needed."""

from __future__ import annotations

import heapq
import threading
from collections import deque

from segue.engine.lora.transfer import CopyJob, CopyTurn

# Layers that one copy brings: so few bytes that the link is through with them soon.
GROUP_BYTES = 32 << 20


class CopyQueue:
    """What passes wait for, in the order in which those began; of one pass the next layer of each load before the one
    after it of any; then what none waits for yet, one load after the other. A load's layers stay in order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loads: dict[CopyTurn, deque[CopyJob]] = {}
        self._heap: list[tuple[tuple[float, int, int], int, CopyTurn]] = []
        self._pushes = 0
        self._ended = False

    @property
    def is_needed(self) -> bool:
        """Whether a pass waits for the next job."""
        with self._changed:
            return bool(self._loads) and self._first().is_needed

    def put(self, job: CopyJob | None) -> None:
        """None: ``get`` returns no more jobs."""
        with self._changed:
            if job is None:
                self._ended = True
            elif job.turn in self._loads:
                self._loads[job.turn].append(job)
            else:
                self._loads[job.turn] = deque([job])
                self._push(job.turn)
            self._changed.notify()

    def hasten(self, turn: CopyTurn, need: float) -> None:
        """A pass waits for a load's jobs, those to come among them: see ``CopyTurn``."""
        with self._changed:
            turn.need = need
            if turn in self._loads:
                self._push(turn)

    def get(self) -> CopyJob | None:
        """The next job, when there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or bool(self._loads))
            return None if self._ended else self._take(self._first(), 1)[0]

    def take_group(self, ahead_bytes: int) -> tuple[CopyJob, ...]:
        """The next jobs that one copy brings, all of one load; none if there are none.

        They are no more layers than came before them, or no more bytes than the ``ahead_bytes`` that the link has
        before them: so the first ones hardly wait for the others. And no more than GROUP_BYTES.
        """
        with self._changed:
            if not self._loads:
                return ()
            turn = self._first()
            jobs = self._loads[turn]
            size_bytes = jobs[0].planned.host_bytes
            count = 1
            while count < len(jobs):
                size_bytes += jobs[count].planned.host_bytes
                if size_bytes > GROUP_BYTES or (count >= jobs[0].layer and size_bytes > ahead_bytes):
                    break
                count += 1
            return self._take(turn, count)

    def _key(self, turn: CopyTurn) -> tuple[float, int, int]:
        layer = self._loads[turn][0].layer
        return (turn.need, layer, turn.arrival) if turn.is_needed else (turn.need, turn.arrival, layer)

    def _push(self, turn: CopyTurn) -> None:
        self._pushes += 1
        heapq.heappush(self._heap, (self._key(turn), self._pushes, turn))

    def _first(self) -> CopyTurn:
        while True:
            key, _, turn = self._heap[0]
            if turn in self._loads and self._key(turn) == key:
                return turn
            heapq.heappop(self._heap)

    def _take(self, turn: CopyTurn, count: int) -> tuple[CopyJob, ...]:
        jobs = self._loads[turn]
        taken = tuple(jobs.popleft() for _ in range(count))
        if jobs:
            self._push(turn)
        else:
            del self._loads[turn]
        return taken
