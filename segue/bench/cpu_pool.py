"""Timing jobs of CPU LoRA workers, through the ring that the engine posts them to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from segue.bench.cpu_shapes import CpuCase, WeightSets, matrices, relative_error
from segue.bench.driver import BenchmarkError
from segue.cpu_lora import CpuLoraConfig, DeltaTask, Job, JobRing, JobState, SharedLayout, SharedMemory, WorkerPool

_READY_SECONDS = 120.0
_JOB_SECONDS = 20.0
_UNTIMED_RUNS = 2


class PoolRunner:
    """A pool of ``workers``, each pinned to a core of its own, for one job at a time of rows, deltas and weights with
    at most so many bytes. ``store`` is where the weights are, uint8 [store_bytes].

    Between entering and leaving, this thread keeps to the cores that workers leave; where they take all, it shares one.
    """

    def __init__(self, workers: int, *, row_bytes: int, delta_bytes: int, store_bytes: int) -> None:
        self._cores = os.sched_getaffinity(0)
        config = CpuLoraConfig(
            workers=workers,
            row_bytes=row_bytes,
            delta_bytes=delta_bytes,
            store_bytes=store_bytes,
            slots=1,
            cores=tuple(sorted(self._cores)[-workers:]),
        )
        self._memory = SharedMemory.create(SharedLayout.plan(config))
        self._memory.allocate_store(config.store_bytes)
        self._pool = WorkerPool(config, self._memory)
        self._ring = JobRing(self._pool)

    @classmethod
    def for_cases(cls, cases: Sequence[CpuCase], workers: int) -> Self:
        """With room for the largest of the cases."""
        item = max(case.element.item_bytes for case in cases)
        tokens = max(case.tokens for case in cases)
        return cls(
            workers,
            row_bytes=tokens * max(case.in_features for case in cases) * item,
            delta_bytes=tokens * max(case.out_features for case in cases) * item,
            store_bytes=max(WeightSets.size_bytes(case) for case in cases),
        )

    @property
    def store(self) -> npt.NDArray[np.uint8]:
        return self._memory.store

    def __enter__(self) -> Self:
        """Raises BenchmarkError if the workers do not start."""
        self._pool.start()
        if not self._pool.wait_ready(self._pool.workers, _READY_SECONDS):
            self.close()
            raise BenchmarkError(f"{self._pool.workers} workers are not ready after {_READY_SECONDS:.0f} seconds")
        os.sched_setaffinity(0, self._cores - set(self._pool.config.cores) or self._cores)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.sched_setaffinity(0, self._cores)
        self._pool.close()
        self._memory.close()

    def job_seconds(self, case: CpuCase, runs: int) -> tuple[list[float], float]:
        """The times from a job's signal to its last share, and the first job's error against float64.

        Raises BenchmarkError for an error beyond rounding, and for a job that fails or takes too long.
        """
        x, a, b = matrices(case)
        sets = WeightSets(case, self._memory.store, a, b)
        errors: list[float] = []

        def tasks(turn: int) -> list[DeltaTask]:
            a_at, b_at = sets.offsets(turn)
            task = DeltaTask(
                row_start=0, row_stop=case.tokens, out_offset=0, out_features=case.out_features, rank=case.rank,
                a_offset_bytes=a_at, b_offset_bytes=b_at, dtype=case.element,
            )  # fmt: skip
            return [task]

        def check(job: Job) -> None:
            if not errors:
                errors.append(relative_error(case, job.deltas, x, a, b))

        return self.jobs_seconds(x, tasks, case.out_features, runs, check), errors[0]

    def jobs_seconds(
        self,
        rows: npt.NDArray[Any],
        tasks: Callable[[int], Sequence[DeltaTask]],
        delta_width: int,
        runs: int,
        check: Callable[[Job], None] = lambda _: None,
        workers: int | None = None,
    ) -> list[float]:
        """The times of jobs from signal to last share, each over ``rows`` and with the tasks of its turn, on so many
        workers (see ``JobRing.prepare``).

        ``check`` is given each job that is done. Raises BenchmarkError for a job that fails or takes too long.
        """
        seconds: list[float] = []
        # Between jobs the workers go on looking for the next, as they do while the engine has jobs in flight.
        self._pool.arm()
        try:
            for turn in range(-_UNTIMED_RUNS, runs):
                job = self._ring.post(rows, tasks(turn), delta_width, workers)
                if job is None:
                    raise BenchmarkError("no worker is ready")
                seconds.append(self._run(job))
                check(job)
                self._ring.release(job)
        finally:
            self._pool.disarm()
        return seconds[_UNTIMED_RUNS:]

    def _run(self, job: Job) -> float:
        start_seconds = time.perf_counter()
        self._ring.signal(job)
        complete = self._ring.wait([job], _JOB_SECONDS)
        took_seconds = time.perf_counter() - start_seconds
        if not complete or job.poll() is not JobState.DONE:
            raise BenchmarkError(f"a job failed, or was not done after {_JOB_SECONDS:.0f} seconds")
        return took_seconds
