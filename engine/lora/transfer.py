"""The jobs of the threads that move weights, and what they report.

The threads report each job with completions; they change no state of the store's. Whatever goes wrong in them is
reported as a failure of the job.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from segue.engine.lora.adapter_path import FileIdentity
from segue.engine.lora.file_runs import ReadRuns, Target
from segue.engine.lora.host_plan import HostPlan, PlannedLayer
from segue.engine.lora.landing import LandingPlace, LandLayer
from segue.gpu_kernels.landing import land_matrices

_LOGGER = logging.getLogger(__name__)


class WeightsError(Exception):
    """The weights cannot be served. The message says why and may be shown to users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOps:
    """The two operations that move bytes; tests put slow or failing ones in their place."""

    read_runs: ReadRuns = Target.read
    land: LandLayer = land_matrices


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadJob:
    """Read a whole adapter into host memory at ``copy_offset``, layer by layer."""

    version_id: int
    descriptor: int
    identity: FileIdentity
    plan: HostPlan
    copy_offset: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CopyJob:
    """Copy one layer from host memory at ``copy_offset`` to its pages. ``cancelled`` skips it if not begun."""

    version_id: int
    layer: int
    planned: PlannedLayer
    copy_offset: int
    place: LandingPlace
    cancelled: threading.Event


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnqueuedCopy:
    """Copy jobs that the device has, and the event recorded behind them."""

    jobs: tuple[CopyJob, ...]
    landed: torch.cuda.Event
    start_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRead:
    """A layer is in host memory and its values are finite; all layers before it are reported before it."""

    job: ReadJob
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailed:
    """A read job cannot be completed. Reads of it may still be under way: it has not ended.

    ``may_pass``: the weights are not to blame, and another time they may be read.
    """

    job: ReadJob
    failure: str
    may_pass: bool
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEnded:
    """Nothing reads for a job any more. Verified, if all was read and the file stayed the same; else it has failed or
    was cancelled. ``seconds`` are since its first read began."""

    job: ReadJob
    verified: bool
    seconds: float
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnqueued:
    """The device lands the layer before it passes the event, which has been recorded."""

    job: CopyJob
    landed: torch.cuda.Event
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyEnded:
    """A copy job has ended: landed, cancelled (neither), or failed. ``seconds`` are those the link was busy with it."""

    job: CopyJob
    landed: bool
    failure: str | None
    seconds: float
    monotonic_seconds: float


Completion = LayerRead | ReadFailed | ReadEnded | CopyEnqueued | CopyEnded
_Job = TypeVar("_Job", CopyJob, EnqueuedCopy)


class JobQueue(Protocol[_Job]):
    """Where jobs wait; ``put`` may wait for room. After None there are no more."""

    def put(self, job: _Job | None) -> None: ...

    def get(self) -> _Job | None: ...


class JobThread(ABC, Generic[_Job]):
    """A thread that carries out the jobs of a queue, one after the other."""

    def __init__(self, name: str, report: Callable[[Completion], None], jobs: JobQueue[_Job]) -> None:
        self._report = report
        self._stopped = threading.Event()
        self._jobs: JobQueue[_Job] = jobs
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        """Queue a job, when there is room; exactly one end of it is reported, unless the thread is stopped before."""
        self._jobs.put(job)

    def close(self) -> None:
        """Stop at the next piece of work and wait for the thread. Jobs not begun are dropped."""
        self._stopped.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                if self._stopped.is_set():
                    return
                self._carry_out(job)

    @abstractmethod
    def _carry_out(self, job: _Job) -> None:
        """Do the job and report its end."""


def failure_message(error: Exception, doing: str) -> str:
    """Why weights could not be ``doing``, as users may see it; the log has what they may not."""
    if isinstance(error, WeightsError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory for the weights to be {doing}"
    if isinstance(error, OSError) and error.strerror:
        return f"the weights could not be {doing}: {error.strerror}"
    _LOGGER.error("adapter weights could not be %s", doing, exc_info=error)
    return f"internal error while the weights were {doing}"
