"""Rows to the CPU workers and deltas back in a CUDA stream's own order: nothing waits on the host.

Kernels carry the rows through registered memory. Between them the stream writes a job's request flag and waits for the
reply flags, which the watchdog answers for a worker that has died: a stream always goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from segue.cpu_lora import Job, JobRing
from segue.engine.lora.bridge import ColumnRanges, PointWork, as_tensor, element_type
from segue.engine.lora.device_lora import LoraSegment
from segue.gpu_kernels.host_rows import add_rows, pack_rows


class StreamFlags(Protocol):
    """Operations on uint32 flags of the shared memory, in the order of the current stream."""

    def write(self, offset_bytes: int, value: int) -> None:
        """Store ``value`` behind all that was enqueued before; other processes see its writes before the flag."""
        ...

    def wait(self, offset_bytes: int, value: int) -> None:
        """What is enqueued later runs when the flag is ``value``."""
        ...

    def mark(self) -> Callable[[], bool]:
        """What tells whether the stream has done all that was enqueued so far."""
        ...

    def synchronize(self) -> None:
        """Wait until all streams have done what was enqueued."""
        ...


class StreamTransport:
    """See RowTransport. Rows and outputs are on the device, and the current stream's."""

    def __init__(self, ring: JobRing, flags: StreamFlags) -> None:
        self._ring = ring
        self._flags = flags

    def post(self, x: Tensor, work: PointWork) -> Job | None:
        row_count = sum(segment.row_stop - segment.row_start for segment in work.segments)
        dtype = element_type(x.dtype)
        job = self._ring.prepare(row_count, x.shape[1], dtype, work.tasks, work.delta_width, work.workers)
        if job is not None:
            rows, places = _placed(x, work.segments)
            pack_rows(rows, places, as_tensor(job.rows))
            self._ring.defer(job)
            self._flags.write(job.request_flag_offset, job.sequence)
        return job

    def may_add(self, job: Job) -> bool:  # noqa: ARG002
        """The stream does the waiting."""
        return True

    def add(
        self, job: Job, segments: Sequence[LoraSegment], columns: ColumnRanges, out: Tensor
    ) -> Callable[[], bool] | None:
        for share in job.shares:
            self._flags.wait(share.reply_flag_offset, job.sequence)
        rows, places = _placed(out, segments)
        add_rows(as_tensor(job.deltas_buffer), places, rows, columns)
        return self._flags.mark()

    def close(self) -> None:
        self._flags.synchronize()


def _placed(matrix: Tensor, segments: Sequence[LoraSegment]) -> tuple[Tensor, Tensor | None]:
    """The segments' rows: a matrix, and which rows of it they are, int64 on its device; None for its first ones."""
    if len(segments) == 1:
        return matrix[segments[0].row_start : segments[0].row_stop], None
    ranges = [torch.arange(item.row_start, item.row_stop, device=matrix.device) for item in segments]
    return matrix, torch.cat(ranges)
