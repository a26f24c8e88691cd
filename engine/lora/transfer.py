"""The two threads that move weights: one from files to host memory, one from host memory to the device's pages.

They carry out jobs strictly in order and report each with a completion; they change no state of the store's. Whatever
goes wrong in them is reported as a failure of the job.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from segue.engine.device import DeviceStreams
from segue.engine.lora.adapter_path import FileIdentity, identity_of
from segue.engine.lora.host_plan import HostPlan, PlannedLayer, PlannedTensor
from segue.engine.lora.link import LinkThrottle
from segue.engine.memory.adapter_layout import ModuleLayout
from segue.gpu_kernels.landing import land_rows

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_PIECE_BYTES = 8 << 20
_LOGGER = logging.getLogger(__name__)

ReadInto = Callable[[int, memoryview, int], int]
"""(descriptor, buffer, file offset) -> bytes read, 0 at the file's end; may read less than the buffer holds."""


class WeightsError(Exception):
    """The weights cannot be served. The message says why and may be shown to users."""


class LandInto(Protocol):
    """Writes one matrix into pages: see gpu_kernels.landing."""

    def __call__(
        self, source: Tensor, pool_layer: Tensor, page_table: Tensor, start: int, chunk_elems: int, *, transpose: bool
    ) -> None: ...


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read from a file straight into ``buffer``."""
    return os.preadv(descriptor, [buffer], offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOps:
    """The two operations that move bytes; tests put slow or failing ones in their place."""

    read_into: ReadInto = read_into
    land: LandInto = land_rows


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
    """Copy one layer from host memory at ``copy_offset`` to its pages. ``cancelled`` skips it if not begun.

    ``behind`` marks the work that may still use the pages as what they were before.
    """

    version_id: int
    layer: int
    planned: PlannedLayer
    layouts: tuple[ModuleLayout, ...]
    copy_offset: int
    page_table: Tensor
    cancelled: threading.Event
    behind: torch.cuda.Event | None


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
class CopyEnded:
    """A copy job has ended: landed, cancelled (neither), or failed."""

    job: CopyJob
    landed: bool
    failure: str | None
    seconds: float
    monotonic_seconds: float


Completion = LayerRead | ReadEnded | CopyEnded
_Job = TypeVar("_Job", ReadJob, CopyJob)


class _JobThread(ABC, Generic[_Job]):
    """A thread that carries out jobs in the order in which they were put."""

    def __init__(self, name: str, report: Callable[[Completion], None]) -> None:
        self._report = report
        self._stopped = threading.Event()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: _Job) -> None:
        """Queue a job; exactly one end of it is reported, unless the thread is stopped before."""
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


class ReaderThread(_JobThread[ReadJob]):
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
            failure = _failure_message(error, "read")
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


class CopierThread(_JobThread[CopyJob]):
    """Copies layers to the device through a staging buffer and writes them into their pages.

    ``pool_layer(i)`` is layer i's pages [pages, page_elems]; ``link`` says when each copy's bytes have gone through. A
    layer has landed on the device, for every stream of it, when its end is reported.
    """

    def __init__(
        self,
        *,
        host: Tensor,
        pool_layer: Callable[[int], Tensor],
        chunk_elems: int,
        link: LinkThrottle,
        land: LandInto,
        streams: DeviceStreams,
        report: Callable[[Completion], None],
    ) -> None:
        self._host = host
        self._streams = streams
        self._pool_layer = pool_layer
        self._chunk_elems = chunk_elems
        self._link = link
        self._land = land
        self._staging = torch.empty(0, dtype=torch.uint8, device=streams.device)
        super().__init__("segue-lora-copier", report)

    def _carry_out(self, job: CopyJob) -> None:
        begin = time.monotonic()
        landed, failure = False, None
        try:
            if not job.cancelled.is_set():
                self._copy(job)
                landed = not self._stopped.is_set()
        except Exception as error:  # noqa: BLE001 - whatever it is, the job's users must learn that it failed
            failure = _failure_message(error, "copied to the device")
        now = time.monotonic()
        self._report(CopyEnded(job=job, landed=landed, failure=failure, seconds=now - begin, monotonic_seconds=now))

    def _copy(self, job: CopyJob) -> None:
        end_seconds = self._link.book(job.planned.host_bytes)
        pages = self._pool_layer(job.layer)
        size = job.planned.host_bytes
        if self._staging.numel() < size:
            self._staging = torch.empty(size, dtype=torch.uint8, device=pages.device)
        start = job.copy_offset + job.planned.host_start
        with self._streams.copies(job.behind):
            self._staging[:size].copy_(self._host[start : start + size], non_blocking=True)
            for module, layout in zip(job.planned.modules, job.layouts, strict=True):
                self._land_matrix(job, module.a, layout.a_start, pages, transpose=False)
                self._land_matrix(job, module.b, layout.b_start, pages, transpose=True)
        self._link.wait_until(end_seconds, self._stopped)

    def _land_matrix(self, job: CopyJob, tensor: PlannedTensor, start: int, pages: Tensor, *, transpose: bool) -> None:
        staged = tensor.host_start - job.planned.host_start
        matrix = self._staging[staged : staged + tensor.host_bytes].view(pages.dtype)
        matrix = matrix.view(tensor.span.rows, tensor.span.columns)
        self._land(matrix, pages, job.page_table, start, self._chunk_elems, transpose=transpose)


def _is_unchanged(descriptor: int, identity: FileIdentity) -> bool:
    status = os.fstat(descriptor)
    now = identity_of(status)
    # Losing its last name moves a file's ctime alone: it was replaced by a rename or deleted, its content is the same.
    return now == identity or (status.st_nlink == 0 and now[:4] == identity[:4])


def _failure_message(error: Exception, doing: str) -> str:
    if isinstance(error, WeightsError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory for the weights to be {doing}"
    if isinstance(error, OSError) and error.strerror:
        return f"the weights could not be {doing}: {error.strerror}"
    _LOGGER.error("adapter weights could not be %s", doing, exc_info=error)
    return f"internal error while the weights were {doing}"
