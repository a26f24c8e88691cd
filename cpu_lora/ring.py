"""The engine's side of the job ring: post rows, signal, wait, take the deltas, give the slot back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from segue.cpu_lora.atomics import spin_until_any
from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.jobs import DeltaTask, Job, JobState, check_tasks, split_rows, write_tasks
from segue.cpu_lora.layout import JOB_DELTA_WIDTH, JOB_ELEMENT, JOB_IN_FEATURES, JOB_LONGS, JOB_TASKS
from segue.cpu_lora.pool import WorkerPool

_PAUSES = 2_000
_YIELDS = 200
_NAP_SECONDS = 50e-6


class JobRing:
    """Posts jobs to a pool's workers. Used from one thread.

    Every job that is not given back keeps the workers armed.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool
        self._memory = pool.memory
        self._table = pool.slot_table
        self._first_worker = 0

    def prepare(
        self,
        row_count: int,
        in_features: int,
        dtype: ElementType,
        tasks: Sequence[DeltaTask],
        delta_width: int,
        workers: int | None = None,
    ) -> Job | None:
        """Set up a job whose rows the caller then writes to ``job.rows``; None when no slot or no worker is free now.

        The rows are split over so many ready workers; None: over all, ``min_rows_per_share`` or more for each. Nothing
        is computed before the job is signalled. The tasks must cover every row and column of the deltas exactly once.

        Raises:
            ValueError: a wrong task, no workers, or rows or deltas larger than a slot.
        """
        if workers is not None and workers < 1:
            raise ValueError(f"workers: must be at least 1, is {workers}")
        self._check_sizes(row_count, in_features, dtype, delta_width)
        check_tasks(tasks, row_count, in_features, delta_width, self._memory.layout)
        with self._table.lock:
            ready = self._pool.ready_lives()
            slot = self._table.free_slot()
            if slot is None or not ready:
                return None
            job_long = self._memory.layout.job_offset // 8 + slot * JOB_LONGS
            record = self._memory.longs[job_long : job_long + JOB_LONGS]
            record[JOB_IN_FEATURES], record[JOB_DELTA_WIDTH] = in_features, delta_width
            record[JOB_ELEMENT], record[JOB_TASKS] = int(dtype), len(tasks)
            write_tasks(self._memory, slot, tasks)
            parts, min_rows = (
                (len(ready), self._pool.config.min_rows_per_share) if workers is None else (min(len(ready), workers), 1)
            )
            ranges = split_rows(tasks, row_count, in_features, parts, min_rows)
            shares = []
            for i, (start, stop) in enumerate(ranges):
                worker, generation = ready[(self._first_worker + i) % len(ready)]
                shares.append((worker, generation, start, stop))
            self._first_worker += len(ranges)
            sequence = self._table.occupy(slot, shares)
        return Job(self._table, self._memory, slot, sequence, (row_count, in_features, delta_width), dtype)

    def post(
        self, rows: npt.NDArray[Any], tasks: Sequence[DeltaTask], delta_width: int, workers: int | None = None
    ) -> Job | None:
        """``prepare`` a job for rows [T, in_features] (float32, float16, uint16 for bfloat16 bits) and copy them in."""
        if rows.ndim != 2:
            raise ValueError(f"rows: must have two dimensions, has shape {rows.shape}")
        job = self.prepare(rows.shape[0], rows.shape[1], ElementType.of(rows.dtype), tasks, delta_width, workers)
        if job is not None:
            job.rows[:] = rows
        return job

    def _check_sizes(self, row_count: int, in_features: int, dtype: ElementType, delta_width: int) -> None:
        layout = self._memory.layout
        if min(row_count, in_features, delta_width) < 1:
            raise ValueError(f"rows: {row_count} x {in_features} rows and {delta_width} columns of deltas are no job")
        row_bytes = row_count * in_features * dtype.item_bytes
        if row_bytes > layout.row_bytes:
            raise ValueError(f"rows: {row_count} x {in_features} take {row_bytes} bytes, a slot has {layout.row_bytes}")
        delta_bytes = row_count * delta_width * dtype.item_bytes
        if delta_bytes > layout.delta_bytes:
            raise ValueError(
                f"deltas: {row_count} x {delta_width} take {delta_bytes} bytes, a slot has {layout.delta_bytes}"
            )

    def signal(self, job: Job) -> None:
        """Write the job's request flag: workers may begin. Jobs may be signalled in any order."""
        self._table.state(job.slot, job.sequence)
        self._table.signal(job.slot, write=True)

    def defer(self, job: Job) -> None:
        """Someone else, a CUDA stream, will write ``job.sequence`` to the request flag; it must happen."""
        self._table.state(job.slot, job.sequence)
        self._table.signal(job.slot, write=False)

    def wait(self, jobs: Sequence[Job], timeout_seconds: float) -> bool:
        """Wait until any of the jobs is complete; returns whether one is.

        Spins without the GIL, then yields the core, then naps for 50 us at a time.
        """
        if not jobs:
            return False
        groups = [self._table.flags(job.slot) for job in jobs]
        flags = np.concatenate(groups)
        ends = np.cumsum([len(group) for group in groups])
        sequences = np.array([job.sequence for job in jobs], np.uint32)
        for job in jobs:
            self._table.state(job.slot, job.sequence)
        deadline_seconds = time.monotonic() + timeout_seconds
        complete = bool(spin_until_any(self._memory.words, flags, ends, sequences, _PAUSES, _YIELDS))
        while not complete and time.monotonic() < deadline_seconds:
            time.sleep(_NAP_SECONDS)
            complete = bool(spin_until_any(self._memory.words, flags, ends, sequences, 1, 0))
        return complete

    def release(self, job: Job) -> None:
        """Give back the slot of a complete job. Raises RuntimeError when it is not complete."""
        if job.poll() is JobState.PENDING:
            raise RuntimeError(f"job {job.sequence} of slot {job.slot} is not complete: wait for it or abandon it")
        self._table.release(job.slot)

    def abandon(self, job: Job) -> None:
        """Give a job up in any state. Its slot is free again once nobody can write to it any more."""
        self._table.state(job.slot, job.sequence)
        self._table.abandon(job.slot)

    @property
    def free_slots(self) -> int:
        """Slots that can be posted to now."""
        return self._table.free_slots()

    def check(self) -> None:
        """Raise AssertionError when an invariant of the slots does not hold."""
        self._table.check()
