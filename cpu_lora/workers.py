"""The lives of the worker processes, as the engine's side knows them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from enum import Enum

from segue.cpu_lora.atomics import observe, publish
from segue.cpu_lora.layout import LINE_BYTES, WORKER_PROGRESS, WORKER_READY
from segue.cpu_lora.memory import SharedMemory

_FIRST_RETRY_SECONDS = 0.02
_LONGEST_RETRY_SECONDS = 5.0
# From fork to ready takes milliseconds; a worker that needs this long is stuck.
_START_SECONDS = 5.0


class WorkerEventKind(Enum):
    """What happened to a worker."""

    READY = "ready"
    STALLED = "stalled"
    DIED = "died"
    ZYGOTE_DIED = "zygote_died"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """Something that happened at ``monotonic_seconds``; the zygote is worker -1, generation 0."""

    kind: WorkerEventKind
    worker: int
    pid: int
    generation: int
    monotonic_seconds: float


class WorkerPhase(Enum):
    """ABSENT: no process. STARTING: fork asked for. LIVE: pidfd held. KILLED: SIGKILL sent, death not yet seen."""

    ABSENT = "absent"
    STARTING = "starting"
    LIVE = "live"
    KILLED = "killed"


_TRANSITIONS: dict[WorkerPhase, frozenset[WorkerPhase]] = {
    WorkerPhase.ABSENT: frozenset({WorkerPhase.STARTING}),
    WorkerPhase.STARTING: frozenset({WorkerPhase.LIVE, WorkerPhase.ABSENT}),
    WorkerPhase.LIVE: frozenset({WorkerPhase.KILLED, WorkerPhase.ABSENT}),
    WorkerPhase.KILLED: frozenset({WorkerPhase.ABSENT}),
}


class WorkerLife:
    """One worker through its successive processes, each with a generation of its own."""

    def __init__(self, memory: SharedMemory, index: int) -> None:
        self._words = memory.words
        self._own_word = memory.layout.geometry().worker_word + index * (LINE_BYTES // 4)
        self.index = index
        self.phase = WorkerPhase.ABSENT
        self.generation = 0
        self.pid = -1
        self.pidfd = -1
        self.announced = False
        self.retry_at_seconds = 0.0
        self._failures = 0
        self._live_since_seconds = 0.0
        self._progress = 0
        self._waiting_since_seconds: float | None = None

    def _move(self, phase: WorkerPhase) -> None:
        if phase not in _TRANSITIONS[self.phase]:
            raise RuntimeError(f"worker {self.index} cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase

    @property
    def is_ready(self) -> bool:
        """Whether this life serves requests."""
        return self.phase is WorkerPhase.LIVE and observe(self._words, self._own_word + WORKER_READY) == self.generation

    def start(self) -> None:
        """A fork of the next generation is asked for."""
        self._move(WorkerPhase.STARTING)
        self.generation += 1

    def live(self, pid: int, pidfd: int) -> None:
        """The fork is done."""
        self._move(WorkerPhase.LIVE)
        self.pid, self.pidfd = pid, pidfd
        self._live_since_seconds = time.monotonic()
        self._waiting_since_seconds = None

    def kill(self) -> None:
        """Send SIGKILL through the pidfd, which cannot hit another process."""
        self._move(WorkerPhase.KILLED)
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self, now_seconds: float) -> None:
        """The process is gone, or never came. A worker that ends before it was ever ready is retried ever later."""
        self._move(WorkerPhase.ABSENT)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pid = self.pidfd = -1
        publish(self._words, self._own_word + WORKER_READY, 0)
        self._failures = 0 if self.announced else self._failures + 1
        delay_seconds = _FIRST_RETRY_SECONDS * 2 ** (self._failures - 1) if self._failures else 0.0
        self.retry_at_seconds = now_seconds + min(delay_seconds, _LONGEST_RETRY_SECONDS)
        self.announced = False

    def has_stalled(self, is_waited_for: bool, now_seconds: float, stall_seconds: float) -> bool:
        """Whether it has been waited for ``stall_seconds`` without a change of its progress counter.

        One that is not ready five seconds after its fork has stalled too.
        """
        if not self.is_ready:
            return now_seconds - self._live_since_seconds >= _START_SECONDS
        progress = observe(self._words, self._own_word + WORKER_PROGRESS)
        if not is_waited_for:
            self._waiting_since_seconds = None
        elif self._waiting_since_seconds is None or progress != self._progress:
            self._waiting_since_seconds, self._progress = now_seconds, progress
        else:
            return now_seconds - self._waiting_since_seconds >= stall_seconds
        return False
