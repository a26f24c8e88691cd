"""The engine's side of the CPU LoRA workers: rows out, deltas back, and what becomes of jobs that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.cpu_lora import DeltaTask, ElementType, Job, JobRing, JobState, WorkerPool
from segue.engine.lora.device_lora import LoraSegment

_ELEMENT_TYPES = {
    torch.float32: ElementType.FLOAT32,
    torch.bfloat16: ElementType.BFLOAT16,
    torch.float16: ElementType.FLOAT16,
}

# (first column of the deltas, first column of the merged output, width) of each projection of a job.
ColumnRanges: TypeAlias = tuple[tuple[int, int, int], ...]


class WorkerLostError(Exception):
    """A CPU worker died or stalled while it computed deltas; what was computed with them must be discarded."""


class ChargedLink(Protocol):
    """The link to the device, whose bandwidth the rows of CPU jobs share with the copies of weights."""

    def book_rows(self, row_bytes: int) -> float: ...


class HostHolds(Protocol):
    """Who keeps adapters' host bytes while a job reads them."""

    def hold_host(self, version_id: int) -> None: ...

    def drop_host(self, version_id: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PointWork:
    """What the CPU computes of one LoRA point: the rows of ``segments``, ``tasks`` over them, deltas of ``delta_width``
    columns. ``workers``: so many share it, see ``JobRing.prepare``."""

    segments: tuple[LoraSegment, ...]
    tasks: tuple[DeltaTask, ...]
    delta_width: int
    workers: int | None = None


class RowTransport(Protocol):
    """How rows travel to the workers and deltas back. ``segments`` say which rows of a pass are a job's, in order."""

    def post(self, x: Tensor, work: PointWork) -> Job | None:
        """Hand the segments' rows of ``x`` [T, in_features] over; the workers begin as soon as they have them.

        None when no slot is free or no worker is ready just now.
        """
        ...

    def may_add(self, job: Job) -> bool:
        """Whether ``add`` may be called now."""
        ...

    def add(
        self, job: Job, segments: Sequence[LoraSegment], columns: ColumnRanges, out: Tensor
    ) -> Callable[[], bool] | None:
        """Add the deltas to the segments' rows of ``out`` [T, merged out features].

        None when that is done, else what tells later whether it is; the job's slot must stay as it is until then.
        """
        ...

    def close(self) -> None:
        """No worker lives any more: return when nothing that was handed over will touch the slots again."""
        ...


class PostedJob:
    """A job that a pass has posted.

    ``link_seconds`` is when its rows have been over the link and back, by the monotonic clock.
    """

    def __init__(self, job: Job, segments: tuple[LoraSegment, ...], link_seconds: float) -> None:
        self.job = job
        self.segments = segments
        self.link_seconds = link_seconds
        self._last: JobState | None = None

    @property
    def version_ids(self) -> tuple[int, ...]:
        """The adapter versions whose host bytes it reads."""
        return tuple(dict.fromkeys(segment.version_id for segment in self.segments))

    def poll(self) -> JobState:
        """The job's state; once its slot has been given back, what it was then."""
        return self._last or self.job.poll()

    def give_back(self, ring: JobRing) -> None:
        """Give the slot of a complete job back."""
        self._last = self.job.poll()
        ring.release(self.job)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    posted: PostedJob
    has_passed: Callable[[], bool] | None

    @property
    def is_over(self) -> bool:
        """Whether neither a worker nor the device will touch its slot again."""
        return self.posted.poll() is not JobState.PENDING and (self.has_passed is None or self.has_passed())


class CpuBridge:
    """Posts jobs to the workers, and has their deltas added. Used from the engine's loop thread alone."""

    def __init__(
        self, pool: WorkerPool, ring: JobRing, transport: RowTransport, link: ChargedLink, holds: HostHolds
    ) -> None:
        self._pool = pool
        self._ring = ring
        self._transport = transport
        self._link = link
        self._holds = holds
        self._under_way: list[_UnderWay] = []

    @property
    def ready_workers(self) -> int:
        """Workers that can serve now."""
        return self._pool.ready_workers

    @property
    def orphans(self) -> int:
        """Jobs under way that no pass will ask for again."""
        return len(self._under_way)

    def post(self, x: Tensor, work: PointWork) -> PostedJob | None:
        """Hand the segments' rows of ``x`` [T, in_features] to the workers; the reply is [their rows, delta_width].

        None when no slot is free or no worker is ready just now. The caller holds the host bytes of the segments'
        versions until ``add`` or ``leave``.
        """
        job = self._transport.post(x, work)
        if job is None:
            return None
        row_bytes = job.rows.shape[0] * (x.shape[1] + work.delta_width) * x.element_size()
        return PostedJob(job, work.segments, self._link.book_rows(row_bytes))

    def wait(self, jobs: Sequence[Job], timeout_seconds: float) -> bool:
        """Whether any of the jobs is complete within the time."""
        return self._ring.wait(jobs, timeout_seconds)

    def may_add(self, posted: PostedJob) -> bool:
        """Whether ``add`` may be called now."""
        return self._transport.may_add(posted.job)

    def add(self, posted: PostedJob, columns: ColumnRanges, out: Tensor) -> None:
        """Add the deltas to ``out`` [T, merged out features] in place, once ``may_add``; the last use of the job.

        Raises WorkerLostError when it is known that a worker was lost. It may turn out later: ``posted.poll`` tells.
        """
        if posted.poll() is JobState.FAILED:
            posted.give_back(self._ring)
            raise WorkerLostError
        has_passed = self._transport.add(posted.job, posted.segments, columns, out)
        if has_passed is None:
            posted.give_back(self._ring)
        else:
            self._keep(posted, has_passed)

    def leave(self, posted: PostedJob) -> None:
        """Nobody waits for this job any more. Its slot, and the host bytes it reads, come back when it is complete."""
        self._keep(posted, None)

    def reap(self) -> None:
        """Give back the slots and the host bytes of jobs under way that are over."""
        over = [item for item in self._under_way if item.is_over]
        self._under_way = [item for item in self._under_way if item not in over]
        for item in over:
            item.posted.give_back(self._ring)
            for version_id in item.posted.version_ids:
                self._holds.drop_host(version_id)

    def close(self) -> None:
        """The workers have been closed: wait until nothing touches the shared memory."""
        self._transport.close()

    def check(self) -> None:
        """Verify the ring's invariants, and that each job under way has a slot of its own."""
        self._ring.check()
        slots = [item.posted.job.slot for item in self._under_way]
        assert len(set(slots)) == len(slots), f"jobs under way share slots: {slots}"
        for item in self._under_way:
            # Raises for a job that has been given back.
            item.posted.job.poll()

    def _keep(self, posted: PostedJob, has_passed: Callable[[], bool] | None) -> None:
        for version_id in posted.version_ids:
            self._holds.hold_host(version_id)
        self._under_way.append(_UnderWay(posted, has_passed))


class HostTransport:
    """For a model on the CPU: rows and deltas are copied by the calling thread, and a pass waits for its workers."""

    def __init__(self, ring: JobRing) -> None:
        self._ring = ring

    def post(self, x: Tensor, work: PointWork) -> Job | None:
        segments = [x[segment.row_start : segment.row_stop] for segment in work.segments]
        rows = _to_numpy(segments[0] if len(segments) == 1 else torch.cat(segments))
        job = self._ring.post(rows, work.tasks, work.delta_width, work.workers)
        if job is not None:
            self._ring.signal(job)
        return job

    def may_add(self, job: Job) -> bool:
        return job.poll() is not JobState.PENDING

    def add(self, job: Job, segments: Sequence[LoraSegment], columns: ColumnRanges, out: Tensor) -> None:
        deltas = as_tensor(job.deltas)
        row = 0
        for segment in segments:
            stop = row + segment.row_stop - segment.row_start
            for in_deltas, in_out, width in columns:
                target = out[segment.row_start : segment.row_stop, in_out : in_out + width]
                target += deltas[row:stop, in_deltas : in_deltas + width]
            row = stop

    def close(self) -> None:
        """Whatever was called has returned."""


def _to_numpy(x: Tensor) -> NDArray[np.generic]:
    """The rows as the workers take them: bfloat16 travels as its bits."""
    x = x.contiguous()
    if x.dtype is torch.bfloat16:
        bits: NDArray[np.generic] = x.view(torch.int16).numpy().view(np.uint16)
        return bits
    rows: NDArray[np.generic] = x.numpy()
    return rows


def as_tensor(matrix: NDArray[Any]) -> Tensor:
    """A job's rows or deltas as a tensor over the same memory."""
    if matrix.dtype == np.uint16:
        return torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(matrix)


def element_type(dtype: torch.dtype) -> ElementType:
    """The workers' name of a torch dtype."""
    return _ELEMENT_TYPES[dtype]
