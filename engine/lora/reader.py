"""The threads that read weights files into the host store, in the order in which layers are needed.

A thread reads one part of a layer at a time. Whose turn it is says FairOrder, in layers: adapters that came together go
on side by side, the next layer of each before the one after it of any.

A read that hangs is bounded. A thread that is at one part for long is overdue: another stands in for it, so that reads
of other adapters find as many threads as ever, and its adapter gets no more of them until it has come back. After
``stall_seconds`` the job fails, and ends when the kernel gives the thread back.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from segue.engine.lora.adapter_path import identity_of
from segue.engine.lora.fair_order import FairOrder
from segue.engine.lora.file_runs import ReadRuns
from segue.engine.lora.part_reader import PartReader, file_dtype
from segue.engine.lora.read_parts import ReadPart, parts_of
from segue.engine.lora.transfer import (
    Completion,
    LayerRead,
    ReadEnded,
    ReadFailed,
    ReadJob,
    failure_message,
)

# What nobody waits for yet gets this many layers later what is waited for.
_PREFETCH_STRIDE = 8.0
_URGENT_STRIDE = 1.0
_MOST_STAND_INS = 32
# Threads that hang in the kernel do not keep an engine from ending.
_JOIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How files are read. A layer is read in parts of at most ``part_bytes``: enough for a read to run at the speed of
    memory, and so few that all ``threads`` are at the layer that is needed first."""

    threads: int = 1
    stall_seconds: float = 10.0
    overdue_seconds: float = 0.05
    part_bytes: int = 2 << 20


@dataclass(slots=True, eq=False)
class _Reading:
    """A job and how far it is. ``unread[i]`` counts layer i's parts that are not in host memory, once it was begun.

    ``overdue`` of the threads that are at it are overdue; while there are any it is not in the order. ``is_over``: it
    has failed or was cancelled, and ends when no thread is at it.
    """

    job: ReadJob
    stride: float
    put_seconds: float
    unread: list[int]
    parts: deque[ReadPart] = field(default_factory=deque)
    begun_layers: int = 0
    reported_layers: int = 0
    under_way: int = 0
    overdue: int = 0
    begin_seconds: float | None = None
    is_over: bool = False

    @property
    def has_more(self) -> bool:
        return bool(self.parts) or self.begun_layers < len(self.unread)

    @property
    def is_complete(self) -> bool:
        return self.reported_layers == len(self.unread)

    def begin_layer(self, parts: list[ReadPart]) -> None:
        self.parts.extend(parts)
        self.unread[self.begun_layers] = len(parts)
        self.begun_layers += 1


@dataclass(slots=True, eq=False)
class _Work:
    """What one thread is at, and since when. ``waits_for_memory`` to be ready, not for the disk."""

    reading: _Reading
    part: ReadPart
    begin_seconds: float
    waits_for_memory: bool = False
    is_overdue: bool = False


class ReaderPool:
    """Threads that read, as many as ``limits`` says, and one that looks for those that hang.

    ``host`` is the host store as uint8 [bytes]. ``make_touchable(stop_bytes)`` is called before bytes below it are
    touched, and may wait. Weights of another dtype than the model's are converted once, on their way. ``report`` must
    not wait; ``wake`` is called behind it, by those that read without the lock, since a system call gives the GIL away.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        make_touchable: Callable[[int], None],
        dtype: torch.dtype,
        read_runs: ReadRuns,
        report: Callable[[Completion], None],
        wake: Callable[[], None],
        limits: ReadLimits,
    ) -> None:
        self._host = host
        self._make_touchable = make_touchable
        self._dtype = dtype
        self._dtype_name = file_dtype(dtype)
        self._read_runs = read_runs
        self._put_report = report
        self._wake = wake
        self._is_told = True
        self._limits = limits
        lock = threading.Lock()
        self._has_work = threading.Condition(lock)
        self._has_begun = threading.Condition(lock)
        self._order: FairOrder[_Reading] = FairOrder()
        self._readings: dict[ReadJob, _Reading] = {}
        self._works: set[_Work] = set()
        self._touchable_bytes = 0
        self._last_begin_seconds = time.monotonic()
        self._overdue_threads = 0
        self._stopped = False
        self._threads: set[threading.Thread] = set()
        self._look_seconds = math.inf
        self._watch = threading.Thread(target=self._watch_reads, name="segue-lora-read-watch", daemon=True)
        with lock:
            for _ in range(limits.threads):
                self._start_thread()
        self._watch.start()

    def put(self, job: ReadJob, *, urgent: bool) -> None:
        """Read a job's layers. Exactly one end is reported, unless the threads are stopped before.

        ``urgent``: a pass waits for it.
        """
        stride = _URGENT_STRIDE if urgent else _PREFETCH_STRIDE
        reading = _Reading(job, stride, time.monotonic(), [0] * len(job.plan.layers))
        with self._has_work:
            self._readings[job] = reading
            self._order.add(reading, stride)
            self._has_work.notify_all()
            self._look_by(reading.put_seconds + self._limits.stall_seconds)

    def hasten(self, job: ReadJob) -> None:
        """A pass waits for the job from now on; nothing if it has ended."""
        with self._has_work:
            reading = self._readings.get(job)
            if reading is not None:
                reading.stride = _URGENT_STRIDE
                if reading in self._order:
                    self._order.hasten(reading, _URGENT_STRIDE)

    def cancel(self, job: ReadJob) -> None:
        """End a job as soon as no thread is at it; nothing if it has ended."""
        with self._has_work:
            reading = self._readings.get(job)
            if reading is not None:
                self._give_up(reading)
                self._end_if_left(reading, verified=False)
        self._tell()

    def close(self) -> None:
        """Stop, each thread behind the part that it is at. Threads that hang in the kernel are left there."""
        with self._has_work:
            self._stopped = True
            self._has_work.notify_all()
            self._has_begun.notify_all()
            threads = tuple(self._threads)
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in (*threads, self._watch):
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- the threads that read ---------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="segue-lora-reader", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _run(self) -> None:
        reader = PartReader(self._host, self._dtype, self._read_runs)
        with torch.inference_mode():
            while (work := self._next()) is not None:
                if self._finish(work, self._read(reader, work)):
                    self._conclude(work)
                self._tell()

    def _report(self, completion: Completion) -> None:
        self._put_report(completion)
        self._is_told = False

    def _tell(self) -> None:
        """Wake who applies reports, if there are new ones."""
        if not self._is_told:
            self._is_told = True
            self._wake()

    def _read(self, reader: PartReader, work: _Work) -> str | None:
        """Why it failed, if it did."""
        job = work.reading.job
        try:
            self._touch(work, job.copy_offset + job.plan.host_bytes)
            reader.read(job, work.part)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            return failure_message(error, "read")
        return None

    def _touch(self, work: _Work, stop_bytes: int) -> None:
        if stop_bytes > self._touchable_bytes:
            work.waits_for_memory = True
            self._make_touchable(stop_bytes)
            with self._has_work:
                self._touchable_bytes = max(self._touchable_bytes, stop_bytes)
                work.waits_for_memory = False
                work.begin_seconds = time.monotonic()

    # -- what they do next, and what they have done: with the lock ---------------------------------------------------

    def _next(self) -> _Work | None:
        """What a thread is to do; None: it is to end."""
        with self._has_work:
            while not self._stopped and len(self._threads) <= self._limits.threads + self._overdue_threads:
                reading = self._order.first()
                if reading is not None:
                    return self._begin(reading)
                self._has_work.wait()
            self._threads.discard(threading.current_thread())
            return None

    def _begin(self, reading: _Reading) -> _Work:
        if not reading.parts:
            layer = reading.begun_layers
            planned = reading.job.plan.layers[layer]
            reading.begin_layer(parts_of(layer, planned, self._dtype_name, self._limits.part_bytes))
        layer_parts = reading.unread[reading.begun_layers - 1]
        part = reading.parts.popleft()
        self._order.charge(reading, 1 / layer_parts)
        if not reading.has_more:
            self._order.remove(reading)
        now = self._last_begin_seconds = time.monotonic()
        reading.under_way += 1
        if reading.begin_seconds is None:
            reading.begin_seconds = now
        work = _Work(reading, part, now)
        self._works.add(work)
        self._look_by(now + self._limits.overdue_seconds)
        return work

    def _finish(self, work: _Work, failure: str | None) -> bool:
        """Take account of a part; whether it was the last of a job, which is to be concluded then."""
        reading = work.reading
        with self._has_work:
            if failure is not None:
                self._fail(reading, failure)
            elif not reading.is_over:
                reading.unread[work.part.layer] -= 1
                self._report_layers(reading)
                if reading.is_complete:
                    return True
            self._leave(work)
            if reading.is_over:
                self._end_if_left(reading, verified=False)
        return False

    def _conclude(self, work: _Work) -> None:
        failure = _verify(work.reading.job)
        with self._has_work:
            if failure is not None:
                self._fail(work.reading, failure)
            self._leave(work)
            self._end_if_left(work.reading, verified=not work.reading.is_over)

    def _report_layers(self, reading: _Reading) -> None:
        """Those that are there, in order."""
        while reading.reported_layers < reading.begun_layers and reading.unread[reading.reported_layers] == 0:
            layer = reading.reported_layers
            reading.reported_layers += 1
            self._report(LayerRead(job=reading.job, layer=layer, monotonic_seconds=time.monotonic()))

    def _leave(self, work: _Work) -> None:
        """A thread has come back from a part."""
        reading = work.reading
        self._works.discard(work)
        reading.under_way -= 1
        if work.is_overdue:
            self._overdue_threads -= 1
            reading.overdue -= 1
            if reading.overdue == 0 and reading.has_more and not reading.is_over:
                self._order.add(reading, reading.stride)
                self._has_work.notify_all()

    def _fail(self, reading: _Reading, failure: str, *, may_pass: bool = False) -> None:
        if not reading.is_over:
            self._give_up(reading)
            now = time.monotonic()
            self._report(ReadFailed(job=reading.job, failure=failure, may_pass=may_pass, monotonic_seconds=now))

    def _give_up(self, reading: _Reading) -> None:
        reading.is_over = True
        if reading in self._order:
            self._order.remove(reading)

    def _end_if_left(self, reading: _Reading, *, verified: bool) -> None:
        if reading.under_way == 0 and self._readings.pop(reading.job, None) is not None:
            now = time.monotonic()
            seconds = now - (now if reading.begin_seconds is None else reading.begin_seconds)
            self._report(ReadEnded(job=reading.job, verified=verified, seconds=seconds, monotonic_seconds=now))

    # -- reads that hang ---------------------------------------------------------------------------------------------

    def _watch_reads(self) -> None:
        with self._has_begun:
            while not self._stopped:
                now = time.monotonic()
                wait_seconds = self._look(now)
                self._tell()
                self._look_seconds = math.inf if wait_seconds is None else now + wait_seconds
                self._has_begun.wait(wait_seconds)

    def _look_by(self, seconds: float) -> None:
        """Have the watch look at this time of the clock, if it would look later."""
        if seconds < self._look_seconds:
            self._look_seconds = seconds
            self._has_begun.notify_all()

    def _look(self, now: float) -> float | None:
        """Act on reads that hang; in how many seconds there may be another one, None if not before one begins."""
        waits = []
        for work in tuple(self._works):
            seconds = now - work.begin_seconds
            if not work.is_overdue and seconds >= self._limits.overdue_seconds:
                self._stand_in_for(work)
            stalls = not work.waits_for_memory and not work.reading.is_over
            if stalls and seconds >= self._limits.stall_seconds:
                self._fail(work.reading, self._stall_failure, may_pass=True)
            waits += [self._limits.overdue_seconds - seconds] * (not work.is_overdue)
            waits += [self._limits.stall_seconds - seconds] * (stalls and not work.reading.is_over)
        if all(not work.waits_for_memory for work in self._works):
            waits += self._look_at_the_queue(now)
        return min(waits, default=None)

    def _look_at_the_queue(self, now: float) -> list[float]:
        """What cannot even begin, because all threads hang and no more may stand in for them, fails as well."""
        waits = []
        for reading in tuple(self._readings.values()):
            if reading in self._order:
                seconds = now - max(reading.put_seconds, self._last_begin_seconds)
                if seconds >= self._limits.stall_seconds:
                    self._fail(reading, self._stall_failure, may_pass=True)
                    self._end_if_left(reading, verified=False)
                else:
                    waits.append(self._limits.stall_seconds - seconds)
        return waits

    def _stand_in_for(self, work: _Work) -> None:
        work.is_overdue = True
        work.reading.overdue += 1
        if work.reading in self._order:
            self._order.remove(work.reading)
        self._overdue_threads += 1
        if len(self._threads) < self._limits.threads + min(self._overdue_threads, _MOST_STAND_INS):
            self._start_thread()

    @property
    def _stall_failure(self) -> str:
        return f"the weights could not be read: the disk did not answer for {self._limits.stall_seconds:g} seconds"


def _verify(job: ReadJob) -> str | None:
    """Why what was read may not be one content of the file, if so."""
    try:
        now = os.fstat(job.descriptor)
    except OSError as error:
        return failure_message(error, "read")
    identity = identity_of(now)
    # Losing its last name moves a file's ctime alone: it was replaced by a rename or deleted, its content is the same.
    if identity == job.identity or (now.st_nlink == 0 and identity[:4] == job.identity[:4]):
        return None
    return "the weights file changed while it was read"
