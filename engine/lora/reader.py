"""The threads that read weights files into the host store, in the order in which layers are needed.

A thread reads one part of a layer at a time. Adapters that came together go on side by side, the next layer of each
before the one after it of any. Threads find out whose turn it is, read, check, count and wake the loop in compiled code
without the GIL (``read_board.py``): while a file is read as it should be, no Python runs for it.

A read that hangs is bounded. A thread that is at one part for long is overdue: another stands in for it, so that reads
of other adapters find as many threads as ever, and its adapter gets no more of them until it has come back. After
``stall_seconds`` the job fails, and ends when the kernel gives the thread back.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from segue.engine.lora import read_board
from segue.engine.lora import read_words as at
from segue.engine.lora.file_runs import ReadRuns, Target
from segue.engine.lora.part_reader import PartReader, file_dtype
from segue.engine.lora.read_board import Outcome
from segue.engine.lora.read_parts import PartTable, ReadPart
from segue.engine.lora.reading import Reading, verify
from segue.engine.lora.transfer import ReadEnded, ReadFailed, ReadJob, ReadReport, failure_message

# What nobody waits for yet gets this many layers later what is waited for.
_PREFETCH_STRIDE = 8
_URGENT_STRIDE = 1
_MOST_STAND_INS = 32
# Threads that hang in the kernel do not keep an engine from ending.
_JOIN_SECONDS = 2.0
_LONGEST_TICK_SECONDS = 0.025
_SHORTEST_TICK_SECONDS = 0.001
_NS_PER_SECOND = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """How files are read. A layer is read in parts of at most ``part_bytes``: enough for a read to run at the speed of
    memory, and so few that all ``threads`` are at the layer that is needed first. They run on ``cores``; if there are
    none, on those of the thread that makes them."""

    threads: int = 1
    stall_seconds: float = 10.0
    overdue_seconds: float = 0.05
    part_bytes: int = 2 << 20
    cores: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class _Work:
    """What thread ``number`` has come back to Python with."""

    number: int
    reading: Reading
    part: ReadPart


class ReaderPool:
    """Threads that read, as many as ``limits`` says, and one that looks for those that hang.

    ``host`` is the host store as uint8 [bytes]. Bytes of it from ``ready_bytes()`` on are touched only behind
    ``make_touchable(stop_bytes)``, which may wait. Weights of another dtype than the model's are converted once, on
    their way. ``read_runs``, if any, is called for each part in place of the compiled reads. ``wake_fd`` is an eventfd,
    made readable whenever ``completed`` has something new. ``put``, ``hasten``, ``cancel`` and ``completed`` are for
    one thread alone.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        ready_bytes: Callable[[], int],
        make_touchable: Callable[[int], None],
        dtype: torch.dtype,
        read_runs: ReadRuns | None,
        wake_fd: int,
        limits: ReadLimits,
    ) -> None:
        """Raises OSError if none of the cores can be had."""
        self._host = host
        self._ready_bytes = ready_bytes
        self._make_touchable = make_touchable
        self._dtype = dtype
        self._dtype_name = file_dtype(dtype)
        self._target = Target.of(host, dtype)
        self._read_runs = read_runs or Target.read
        self._wake_fd = wake_fd
        self._limits = limits
        self._lock = threading.Lock()
        self._under_way: dict[ReadJob, Reading] = {}
        self._last_number = 0
        self._by_number: dict[int, Reading] = {}
        self._reports: deque[ReadFailed | ReadEnded] = deque()
        self._seen_advances = 0
        self._stopped = False
        self._most_threads = limits.threads + _MOST_STAND_INS
        self._numbers = set(range(self._most_threads))
        self._threads: set[threading.Thread] = set()
        self._board = self._make_board(all_in_python=read_runs is not None)
        self._watch = threading.Thread(target=self._watch_reads, name="segue-lora-read-watch", daemon=True)
        with _on_cores(limits.cores):
            for _ in range(limits.threads):
                self._start_thread_if_wanted()
            self._watch.start()

    def _make_board(self, *, all_in_python: bool) -> at.Words:
        board = np.zeros(at.BOARD_SLOTS + self._most_threads * at.SLOT_WORDS, dtype=np.int64)
        board[at.BOARD_ONE] = 1
        board[at.BOARD_WAKE_FD] = self._wake_fd
        board[at.BOARD_WANTED_THREADS] = self._limits.threads
        board[at.BOARD_ITEM_BYTES] = self._target.bits.item_bytes
        board[at.BOARD_FIRST_NOT_FINITE] = self._target.bits.first_not_finite
        board[at.BOARD_ALL_IN_PYTHON] = all_in_python
        board[at.BOARD_LAST_BEGIN_NS] = time.monotonic_ns()
        return board

    def put(self, job: ReadJob, *, urgent: bool) -> None:
        """Read a job's layers. Exactly one end is reported, unless the threads are stopped before.

        ``urgent``: a pass waits for it.
        """
        table = PartTable.of(job.plan, self._dtype_name, self._limits.part_bytes)
        self._last_number += 1
        reading = Reading.of(self._last_number, job, table, _URGENT_STRIDE if urgent else _PREFETCH_STRIDE)
        self._under_way[job] = self._by_number[reading.number] = reading
        if reading.stop_bytes > self._board[at.BOARD_TOUCHABLE_BYTES]:
            read_board.raise_touchable(self._board, self._ready_bytes())
        read_board.add(self._board, reading.words)

    def hasten(self, job: ReadJob) -> None:
        """A pass waits for the job from now on; nothing if it has ended."""
        reading = self._under_way.get(job)
        if reading is not None:
            read_board.hasten(self._board, reading.words, _URGENT_STRIDE)

    def cancel(self, job: ReadJob) -> None:
        """End a job as soon as no thread is at it; nothing if it has ended."""
        reading = self._under_way.get(job)
        if reading is not None:
            _, has_ended = read_board.give_up(self._board, reading.words)
            if has_ended:
                self._end(reading, verified=False)

    def completed(self) -> list[ReadReport]:
        """What there is to say of all jobs since the last call: of each its layers first, in order."""
        # Layers are looked at behind the reports: of a job that has ended, all are seen.
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        layers: list[ReadReport] = []
        advances = read_board.observe_word(self._board, at.BOARD_ADVANCES)
        if advances != self._seen_advances:
            self._seen_advances = advances
            for reading in self._under_way.values():
                layers += reading.new_layers()
        for report in reports:
            if isinstance(report, ReadEnded):
                del self._under_way[report.job]
        return layers + reports

    def close(self) -> None:
        """Stop, each thread behind the part that it is at. Threads that hang in the kernel are left there."""
        self._stopped = True
        read_board.close(self._board)
        with self._lock:
            threads = tuple(self._threads)
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in (*threads, self._watch):
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- the threads that read ---------------------------------------------------------------------------------------

    def _start_thread_if_wanted(self) -> None:
        with self._lock:
            if self._numbers and read_board.may_start(self._board, _MOST_STAND_INS):
                number = self._numbers.pop()
                thread = threading.Thread(target=self._run, args=(number,), name="segue-lora-reader", daemon=True)
                self._threads.add(thread)
                thread.start()

    def _run(self, number: int) -> None:
        reader = PartReader(self._host, self._dtype, self._read_runs)
        slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
        with torch.inference_mode():
            while (outcome := self._serve(number)) is not Outcome.LEAVE:
                reading = self._by_number[int(self._board[slot + at.SLOT_READ_ID])]
                if outcome is Outcome.PART:
                    work = _Work(number, reading, reading.table.part(int(self._board[slot + at.SLOT_PART])))
                    outcome = self._finish(work, self._read(reader, work))
                if outcome is Outcome.COMPLETE:
                    self._conclude(number, reading)
                elif outcome is Outcome.ENDED:
                    self._end(reading, verified=False)
        with self._lock:
            self._numbers.add(number)
            self._threads.discard(threading.current_thread())

    def _serve(self, number: int) -> Outcome:
        return Outcome(read_board.serve(self._board, number, self._target.halves, self._target.words))

    def _read(self, reader: PartReader, work: _Work) -> str | None:
        """Read a part that is not as usual; why it failed, if it did."""
        try:
            self._touch(work)
            reader.read(work.reading.job, work.part)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            return failure_message(error, "read")
        return None

    def _touch(self, work: _Work) -> None:
        stop_bytes = work.reading.stop_bytes
        if stop_bytes > self._board[at.BOARD_TOUCHABLE_BYTES]:
            self._make_touchable(stop_bytes)
            read_board.raise_touchable(self._board, stop_bytes)
        read_board.memory_is_there(self._board, work.number)

    def _finish(self, work: _Work, failure: str | None) -> Outcome:
        if failure is not None:
            self._fail(work.reading, failure)
        return Outcome(read_board.finish(self._board, work.number, failure is None))

    def _conclude(self, number: int, reading: Reading) -> None:
        failure = verify(reading.job)
        if failure is not None:
            self._fail(reading, failure)
        self._end(reading, verified=read_board.conclude(self._board, number))

    def _fail(self, reading: Reading, failure: str, *, may_pass: bool = False) -> None:
        is_new, has_ended = read_board.give_up(self._board, reading.words)
        if is_new:
            now = time.monotonic()
            self._report(ReadFailed(job=reading.job, failure=failure, may_pass=may_pass, monotonic_seconds=now))
        if has_ended:
            self._end(reading, verified=False)

    def _end(self, reading: Reading, *, verified: bool) -> None:
        del self._by_number[reading.number]
        now = time.monotonic()
        self._report(ReadEnded(job=reading.job, verified=verified, seconds=reading.seconds, monotonic_seconds=now))

    def _report(self, report: ReadFailed | ReadEnded) -> None:
        self._reports.append(report)
        # A thread that hung may come back when the loop is gone, and its descriptor with it.
        if not self._stopped:
            os.eventfd_write(self._wake_fd, 1)

    # -- reads that hang ---------------------------------------------------------------------------------------------

    def _watch_reads(self) -> None:
        limits = self._limits
        late_seconds = min(limits.overdue_seconds, limits.stall_seconds)
        tick_seconds = max(_SHORTEST_TICK_SECONDS, min(_LONGEST_TICK_SECONDS, late_seconds / 2))
        late_ns, tick_us = int(late_seconds * _NS_PER_SECOND), int(tick_seconds * 1e6)
        while read_board.watch(self._board, self._most_threads, late_ns, tick_us):
            self._look(time.monotonic())

    def _look(self, now: float) -> None:
        """Act on reads that hang."""
        seen = np.empty_like(self._board)
        read_board.look(self._board, seen)
        waits_for_memory = False
        for number in range(self._most_threads):
            slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
            if seen[slot + at.SLOT_READ]:
                waits_for_memory |= bool(seen[slot + at.SLOT_WAITS_FOR_MEMORY])
                self._look_at(number, seen[slot : slot + at.SLOT_WORDS].tolist(), now)
        if not waits_for_memory:
            self._look_at_the_queue(now, seen[at.BOARD_LAST_BEGIN_NS] / _NS_PER_SECOND)

    def _look_at(self, number: int, slot: list[int], now: float) -> None:
        begin_ns = slot[at.SLOT_BEGIN_NS]
        seconds = now - begin_ns / _NS_PER_SECOND
        is_late = seconds >= self._limits.overdue_seconds
        if is_late and read_board.mark_overdue(self._board, number, begin_ns):
            self._start_thread_if_wanted()
        reading = self._by_number.get(slot[at.SLOT_READ_ID])
        if seconds >= self._limits.stall_seconds and not slot[at.SLOT_WAITS_FOR_MEMORY] and reading is not None:
            self._fail(reading, self._stall_failure, may_pass=True)

    def _look_at_the_queue(self, now: float, last_begin_seconds: float) -> None:
        """What cannot even begin, because all threads hang and no more may stand in for them, fails as well."""
        for reading in tuple(self._by_number.values()):
            waits_seconds = now - max(reading.put_seconds, last_begin_seconds)
            if reading.words[at.READ_IS_IN_ORDER] and waits_seconds >= self._limits.stall_seconds:
                self._fail(reading, self._stall_failure, may_pass=True)

    @property
    def _stall_failure(self) -> str:
        return f"the weights could not be read: the disk did not answer for {self._limits.stall_seconds:g} seconds"


@contextmanager
def _on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Threads that are started in the block run on ``cores``, if there are any."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
