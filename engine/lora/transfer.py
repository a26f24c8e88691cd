"""The jobs of the threads that move weights, and the thread that reads them from files into host memory.

The threads carry out jobs strictly in order and report each with a completion; they change no state of the store's.
Whatever goes wrong in them is reported as a failure of the job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Queue
from typing import Generic, TypeVar

import torch
from torch import Tensor

from segue.engine.lora.adapter_path import FileIdentity, identity_of
from segue.engine.lora.host_plan import HostPlan, PlannedLayer, PlannedTensor
from segue.engine.lora.landing import LandingPlace, LandLayer
from segue.gpu_kernels.landing import land_matrices

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PIECE_BYTES = 8 << 20
_LOGGER = logging.getLogger(__name__)

ReadInto = Callable[[int, memoryview, int], int]
"""(descriptor, buffer, file offset) -> bytes read, 0 at the file's end; may read less than the buffer holds."""


class WeightsError(Exception):
    """The weights cannot be served. The message says why and may be shown to users."""


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read from a file straight into ``buffer``."""
    return os.preadv(descriptor, [buffer], offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOps:
    """The two operations that move bytes; tests put slow or failing ones in their place."""

    read_into: ReadInto = read_into
    land: LandLayer = land_matrices


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadJob:
    """Read a whole adapter into host memory at ``copy_offset``, layer by layer. ``cancelled`` ends it early."""

    version_id: int
    descriptor: int
    identity: FileIdentity
    plan: HostPlan
    copy_offset: int
    cancelled: threading.Event = field(default_factory=threading.Event)


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
    """A copy job that the device has, and the event recorded behind it."""

    job: CopyJob
    landed: torch.cuda.Event
    start_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRead:
    """A layer is in host memory and its values are finite."""

    job: ReadJob
    layer: int
    monotonic_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEnded:
    """A read job has ended: verified (the file stayed the same), cancelled (neither), or failed."""

    job: ReadJob
    verified: bool
    failure: str | None
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


Completion = LayerRead | ReadEnded | CopyEnqueued | CopyEnded
_Job = TypeVar("_Job", ReadJob, CopyJob, EnqueuedCopy)


class JobThread(ABC, Generic[_Job]):
    """A thread that carries out jobs in the order in which they were put, at most ``max_jobs`` (0: any) in waiting."""

    def __init__(self, name: str, report: Callable[[Completion], None], max_jobs: int = 0) -> None:
        self._report = report
        self._stopped = threading.Event()
        self._jobs: Queue[_Job | None] = Queue(max_jobs)
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


class ReaderThread(JobThread[ReadJob]):
    """Reads weights files into the host store.

    ``host`` is the host store as uint8 [bytes]. ``make_touchable(stop_bytes)`` is called before bytes below it are
    touched. Weights of another dtype than the model's are converted once, on their way.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        make_touchable: Callable[[int], None],
        dtype: torch.dtype,
        read_into: ReadInto,
        report: Callable[[Completion], None],
    ) -> None:
        self._host = host
        self._bytes = host.numpy().data
        self._make_touchable = make_touchable
        self._dtype = dtype
        self._read_into = read_into
        self._scratch = torch.empty(0, dtype=torch.uint8)
        super().__init__("segue-lora-reader", report)

    def _carry_out(self, job: ReadJob) -> None:
        begin = time.monotonic()
        verified, failure = False, None
        try:
            verified = self._read(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            failure = failure_message(error, "read")
        now = time.monotonic()
        self._report(ReadEnded(job=job, verified=verified, failure=failure, seconds=now - begin, monotonic_seconds=now))

    def _read(self, job: ReadJob) -> bool:
        """False when the job was cancelled. Raises WeightsError."""
        self._make_touchable(job.copy_offset + job.plan.host_bytes)
        for index, layer in enumerate(job.plan.layers):
            for module in layer.modules:
                for tensor in (module.a, module.b):
                    if not self._read_tensor(job, tensor):
                        return False
            self._report(LayerRead(job=job, layer=index, monotonic_seconds=time.monotonic()))
        if not _is_unchanged(job.descriptor, job.identity):
            raise WeightsError("the weights file changed while it was read")
        return True

    def _read_tensor(self, job: ReadJob, tensor: PlannedTensor) -> bool:
        file_dtype = FILE_DTYPES[tensor.span.dtype]
        start = job.copy_offset + tensor.host_start
        stop = start + tensor.host_bytes
        values = self._host[start:stop].view(self._dtype)
        if file_dtype is self._dtype:
            complete = self._read_bytes(job, self._bytes[start:stop], tensor)
        else:
            if self._scratch.numel() < tensor.span.nbytes:
                self._scratch = torch.empty(tensor.span.nbytes, dtype=torch.uint8)
            raw = self._scratch[: tensor.span.nbytes]
            complete = self._read_bytes(job, raw.numpy().data, tensor)
            values.copy_(raw.view(file_dtype))
        # NaN propagates through aminmax, so that one pass without a temporary finds it.
        if complete and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values)):
            raise WeightsError(
                f"{tensor.label} holds NaN or infinite values in {str(self._dtype).removeprefix('torch.')}"
            )
        return complete

    def _read_bytes(self, job: ReadJob, buffer: memoryview, tensor: PlannedTensor) -> bool:
        done = 0
        while done < len(buffer):
            if job.cancelled.is_set() or self._stopped.is_set():
                return False
            count = self._read_into(job.descriptor, buffer[done : done + _PIECE_BYTES], tensor.span.file_offset + done)
            if count == 0:
                raise WeightsError(f"the weights file is truncated: it ends within {tensor.label}")
            done += count
        return True


def _is_unchanged(descriptor: int, identity: FileIdentity) -> bool:
    status = os.fstat(descriptor)
    now = identity_of(status)
    # Losing its last name moves a file's ctime alone: it was replaced by a rename or deleted, its content is the same.
    return now == identity or (status.st_nlink == 0 and now[:4] == identity[:4])


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
