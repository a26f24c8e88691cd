"""The engine's side of the CPU LoRA workers: tensors in, deltas out, and what becomes of jobs that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segue.cpu_lora import DeltaTask, ElementType, Job, JobRing, JobState, WorkerPool

_ELEMENT_TYPES = {
    torch.float32: ElementType.FLOAT32,
    torch.bfloat16: ElementType.BFLOAT16,
    torch.float16: ElementType.FLOAT16,
}


class WorkerLostError(Exception):
    """A CPU worker died or stalled while it computed deltas; what was computed with them must be discarded."""


class ChargedLink(Protocol):
    """The link to the device, whose bandwidth the rows of CPU jobs share with the copies of weights."""

    def book_rows(self, row_bytes: int) -> float: ...


@dataclass(frozen=True, slots=True)
class PostedJob:
    """A job under way, and when its rows have been over the link and back (seconds of the monotonic clock)."""

    job: Job
    link_seconds: float


@dataclass(frozen=True, slots=True)
class _Orphan:
    job: Job
    version_ids: tuple[int, ...]


class CpuBridge:
    """Posts jobs to the workers and takes their deltas. Used from the engine's loop thread alone."""

    def __init__(self, pool: WorkerPool, ring: JobRing, link: ChargedLink, device: torch.device) -> None:
        """``device`` is where rows come from and deltas go."""
        self._device = device
        self._pool = pool
        self._ring = ring
        self._link = link
        self._orphans: list[_Orphan] = []

    @property
    def ready_workers(self) -> int:
        """Workers that can serve now."""
        return self._pool.ready_workers

    @property
    def orphans(self) -> int:
        """Jobs under way that nobody waits for."""
        return len(self._orphans)

    def post(self, x: Tensor, tasks: Sequence[DeltaTask], delta_width: int) -> PostedJob | None:
        """Hand rows ``x`` [T, in_features] to the workers; the reply is [T, delta_width].

        None when no slot is free or no worker is ready just now.
        """
        job = self._ring.post(_to_numpy(x), tasks, delta_width)
        if job is None:
            return None
        self._ring.signal(job)
        row_bytes = x.shape[0] * (x.shape[1] + delta_width) * x.element_size()
        return PostedJob(job, self._link.book_rows(row_bytes))

    def wait(self, jobs: Sequence[Job], timeout_seconds: float) -> bool:
        """Whether any of the jobs is complete within the time."""
        return self._ring.wait(jobs, timeout_seconds)

    def take(self, job: Job) -> Tensor:
        """The deltas [T, delta_width] of a complete job on the device, which for the CPU ``release`` gives back.

        Raises WorkerLostError when a worker was lost.
        """
        if job.poll() is not JobState.DONE:
            raise WorkerLostError
        return _to_torch(job.deltas).to(self._device)

    def release(self, job: Job) -> None:
        """Give a complete job's slot back."""
        self._ring.release(job)

    def orphan(self, job: Job, version_ids: tuple[int, ...]) -> None:
        """Nobody waits for this job any more. Its slot, and the host bytes it reads, come back when it is complete."""
        self._orphans.append(_Orphan(job, version_ids))

    def reap(self) -> tuple[int, ...]:
        """Release orphans that are complete; the adapter versions whose host bytes each of them had held."""
        complete = [orphan for orphan in self._orphans if orphan.job.poll() is not JobState.PENDING]
        self._orphans = [orphan for orphan in self._orphans if orphan not in complete]
        for orphan in complete:
            self._ring.release(orphan.job)
        return tuple(version_id for orphan in complete for version_id in orphan.version_ids)

    def check(self) -> None:
        """Verify the ring's invariants."""
        self._ring.check()


def _to_numpy(x: Tensor) -> NDArray[np.generic]:
    """The rows as the workers take them: bfloat16 travels as its bits."""
    x = x.contiguous().cpu()
    if x.dtype is torch.bfloat16:
        bits: NDArray[np.generic] = x.view(torch.int16).numpy().view(np.uint16)
        return bits
    rows: NDArray[np.generic] = x.numpy()
    return rows


def _to_torch(deltas: NDArray[np.generic]) -> Tensor:
    if deltas.dtype == np.uint16:
        return torch.from_numpy(deltas.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(deltas)


def element_type(dtype: torch.dtype) -> ElementType:
    """The workers' name of a torch dtype."""
    return _ELEMENT_TYPES[dtype]
