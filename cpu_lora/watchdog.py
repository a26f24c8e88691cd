"""The watchdog: starts, watches, kills and replaces the workers, and answers for the dead.

No flag is answered for a worker, and no slot of its work reused, before the kernel has reported its process dead. So a
stopped or slow worker can never write late. All waiting is on descriptors with a time limit; no CUDA call is made.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from segue.cpu_lora.arming import Arming
from segue.cpu_lora.config import CpuLoraConfig
from segue.cpu_lora.launcher import ZygoteProcess
from segue.cpu_lora.memory import SharedMemory
from segue.cpu_lora.slots import SlotTable
from segue.cpu_lora.workers import WorkerEvent, WorkerEventKind, WorkerLife, WorkerPhase

_LOGGER = logging.getLogger(__name__)
_KEPT_EVENTS = 1_000
_TURNS_PER_STALL = 10
_ZYGOTE_RETRY_SECONDS = 1.0
_DEATH_SECONDS = 10.0


class Watchdog:
    """A daemon thread that supervises one zygote and its workers.

    The zygote is started from this thread, and dies with it (PR_SET_PDEATHSIG follows the thread).
    """

    def __init__(
        self,
        config: CpuLoraConfig,
        memory: SharedMemory,
        table: SlotTable,
        arming: Arming,
        on_event: Callable[[WorkerEvent], None] | None,
    ) -> None:
        self._config = config
        self._memory = memory
        self._table = table
        self._arming = arming
        self._on_event = on_event
        self._zygote: ZygoteProcess | None = None
        self._zygote_retry_at_seconds = 0.0
        self._stopping = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="segue-cpu-watchdog", daemon=True)
        self.lives = [WorkerLife(memory, index) for index in range(config.workers)]
        self.events: deque[WorkerEvent] = deque(maxlen=_KEPT_EVENTS)
        self.failure: BaseException | None = None

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the zygote, if one is running."""
        zygote = self._zygote
        return zygote.pid if zygote else None

    def start(self) -> None:
        """Start supervising; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stop: every worker is killed and seen dead, every unfinished share answered FAILED, the zygote reaped."""
        self._stopping.set()
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._wake_fd)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:
            _LOGGER.exception("supervision of the CPU LoRA workers ended")
            self.failure = error
        finally:
            self._end_all()

    def _turn(self) -> None:
        self._start_missing()
        ready = self._poll(self._config.stall_seconds / _TURNS_PER_STALL)
        if self._zygote is not None and self._zygote.fileno() in ready:
            self._receive()
        # First, so that a worker that served and died in between is seen to have served.
        self._announce()
        self._bury({life.index for life in self.lives if life.pidfd in ready})
        self._kill_stalled()
        self._table.reclaim()

    def _poll(self, timeout_seconds: float) -> frozenset[int]:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        if self._zygote is not None:
            poller.register(self._zygote.fileno(), select.POLLIN)
        for life in self.lives:
            if life.pidfd >= 0:
                poller.register(life.pidfd, select.POLLIN)
        return frozenset(fd for fd, _ in poller.poll(timeout_seconds * 1000))

    def _emit(self, kind: WorkerEventKind, worker: int, pid: int, generation: int) -> None:
        event = WorkerEvent(
            kind=kind, worker=worker, pid=pid, generation=generation, monotonic_seconds=time.monotonic()
        )
        self.events.append(event)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            _LOGGER.exception("on_event failed for %s", event)

    def _start_missing(self) -> None:
        now_seconds = time.monotonic()
        if self._zygote is None:
            if not self.lives or now_seconds < self._zygote_retry_at_seconds:
                return
            try:
                self._zygote = ZygoteProcess(self._memory.fd, self._arming.wake_fds)
            except OSError:
                _LOGGER.exception("cannot start the zygote")
                self._zygote_retry_at_seconds = now_seconds + _ZYGOTE_RETRY_SECONDS
                return
        for life in self.lives:
            if life.phase is not WorkerPhase.ABSENT or now_seconds < life.retry_at_seconds:
                continue
            life.start()
            core = self._config.cores[life.index] if self._config.cores else -1
            try:
                self._zygote.request_fork(life.index, life.generation, core)
            except OSError:
                # The zygote has gone or is too busy; the first is seen at its socket, the second passes.
                life.end(now_seconds)

    def _receive(self) -> None:
        assert self._zygote is not None
        forked = self._zygote.receive()
        if forked is None:
            self._bury_zygote()
            return
        life = self.lives[forked.worker]
        if forked.pidfd < 0:
            life.end(time.monotonic())
        else:
            with self._table.lock:
                life.live(forked.pid, forked.pidfd)

    def _bury_zygote(self) -> None:
        """The zygote has gone; the kernel kills its workers, which their pidfds then show."""
        assert self._zygote is not None
        zygote, self._zygote = self._zygote, None
        zygote.close()
        now_seconds = time.monotonic()
        self._zygote_retry_at_seconds = now_seconds + (0.0 if self._any_was_ready() else _ZYGOTE_RETRY_SECONDS)
        for life in self.lives:
            if life.phase is WorkerPhase.STARTING:
                life.end(now_seconds)
        self._emit(WorkerEventKind.ZYGOTE_DIED, -1, zygote.pid, 0)

    def _any_was_ready(self) -> bool:
        return any(life.announced for life in self.lives)

    def _bury(self, dead: set[int]) -> None:
        """Answer for workers whose processes the kernel reports dead."""
        for index in dead:
            life = self.lives[index]
            pid, generation = life.pid, life.generation
            with self._table.lock:
                life.end(time.monotonic())
                self._table.fail_shares(index)
            self._emit(WorkerEventKind.DIED, index, pid, generation)

    def _announce(self) -> None:
        for life in self.lives:
            if not life.announced and life.is_ready:
                life.announced = True
                self._emit(WorkerEventKind.READY, life.index, life.pid, life.generation)

    def _kill_stalled(self) -> None:
        waited_for = self._table.waiting_workers() if self._arming.count else frozenset()
        now_seconds = time.monotonic()
        for life in self.lives:
            if life.phase is not WorkerPhase.LIVE:
                continue
            if life.has_stalled(life.index in waited_for, now_seconds, self._config.stall_seconds):
                with self._table.lock:
                    life.kill()
                self._emit(WorkerEventKind.STALLED, life.index, life.pid, life.generation)

    def _end_all(self) -> None:
        """Kill every worker, wait until each is seen dead, answer what is left, and end the zygote."""
        with self._table.lock:
            for life in self.lives:
                if life.phase is WorkerPhase.LIVE:
                    life.kill()
        for life in self.lives:
            if life.phase is not WorkerPhase.KILLED:
                continue
            poller = select.poll()
            poller.register(life.pidfd, select.POLLIN)
            if poller.poll(_DEATH_SECONDS * 1000):
                self._bury({life.index})
            else:
                # Answering for it would be a lie: it may still write.
                _LOGGER.error("worker %d (pid %d) does not die; its shares stay unanswered", life.index, life.pid)
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        for life in self.lives:
            if life.phase is WorkerPhase.STARTING:
                life.end(time.monotonic())
