"""Jobs: one LoRA point of one layer for some rows, and the tasks that make it up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from segue.cpu_lora.elements import ElementType
from segue.cpu_lora.layout import (
    MAX_RANK,
    TASK_A,
    TASK_B,
    TASK_ELEMENT,
    TASK_LONGS,
    TASK_OUT_FEATURES,
    TASK_OUT_OFFSET,
    TASK_RANK,
    TASK_ROW_START,
    TASK_ROW_STOP,
    TASK_SCALE,
    SharedLayout,
)
from segue.cpu_lora.memory import SharedMemory
from segue.cpu_lora.slots import Share, SlotState, SlotTable


class JobState(Enum):
    """PENDING until every share is answered; FAILED when a worker died or stalled over one: the deltas are garbage."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaTask:
    """``deltas[row_start:row_stop, out_offset:out_offset + out_features] = scale * (rows @ A.T) @ B.T``.

    A is ``[rank, in_features]`` and B ``[out_features, rank]``, row-major, of element type ``dtype``, at byte offsets
    of the host store. Rank 0 stands for zeros: a module without adapter, or rows without one.
    """

    row_start: int
    row_stop: int
    out_offset: int
    out_features: int
    rank: int
    a_offset_bytes: int = 0
    b_offset_bytes: int = 0
    scale: float = 1.0
    dtype: ElementType = ElementType.FLOAT32


def check_tasks(
    tasks: Sequence[DeltaTask], row_count: int, in_features: int, delta_width: int, layout: SharedLayout
) -> None:
    """Raise ValueError, naming the task, unless the tasks can be run and cover every delta exactly once."""
    if not 1 <= len(tasks) <= layout.max_tasks:
        raise ValueError(f"tasks: a job has 1 to {layout.max_tasks}, not {len(tasks)}")
    for index, task in enumerate(tasks):
        problem = _task_problem(task, row_count, in_features, delta_width, layout.store_bytes)
        if problem:
            raise ValueError(f"tasks[{index}].{problem}")
    top, bottom, left, width = (
        np.array([getattr(task, name) for task in tasks])
        for name in ("row_start", "row_stop", "out_offset", "out_features")
    )
    right = left + width
    meets = (top[:, None] < bottom) & (top < bottom[:, None]) & (left[:, None] < right) & (left < right[:, None])
    if np.count_nonzero(meets) > len(tasks):
        first, second = np.argwhere(np.triu(meets, 1))[0]
        raise ValueError(f"tasks[{second}]: covers deltas of tasks[{first}] again")
    covered = int(((bottom - top) * width).sum())
    if covered != row_count * delta_width:
        raise ValueError(f"tasks: cover {covered} of {row_count} x {delta_width} deltas; rank 0 stands for zeros")


def _task_problem(task: DeltaTask, row_count: int, in_features: int, delta_width: int, store_bytes: int) -> str | None:
    if not 0 <= task.row_start < task.row_stop <= row_count:
        return f"row_start, row_stop: {task.row_start}, {task.row_stop} is no range of {row_count} rows"
    if task.out_features <= 0 or not 0 <= task.out_offset <= delta_width - task.out_features:
        return f"out_offset: {task.out_features} columns at {task.out_offset} exceed {delta_width}"
    if not 0 <= task.rank <= MAX_RANK:
        return f"rank: must be 0 to {MAX_RANK}, is {task.rank}"
    if task.rank == 0:
        return None
    if not math.isfinite(task.scale):
        return f"scale: must be finite, is {task.scale}"
    item = task.dtype.item_bytes
    for name, offset, features in (
        ("a_offset_bytes", task.a_offset_bytes, in_features),
        ("b_offset_bytes", task.b_offset_bytes, task.out_features),
    ):
        if offset % item:
            return f"{name}: {offset} is no multiple of {item}"
        if not 0 <= offset <= store_bytes - task.rank * features * item:
            return f"{name}: {task.rank} x {features} elements at {offset} exceed the store of {store_bytes} bytes"
    return None


def write_tasks(memory: SharedMemory, slot: int, tasks: Sequence[DeltaTask]) -> None:
    """Write the task records of a slot."""
    begin = memory.layout.task_offset // 8 + slot * memory.layout.max_tasks * TASK_LONGS
    end = begin + len(tasks) * TASK_LONGS
    records = np.zeros((len(tasks), TASK_LONGS), np.int64)
    for record, task in zip(records, tasks, strict=True):
        record[TASK_ROW_START], record[TASK_ROW_STOP] = task.row_start, task.row_stop
        record[TASK_OUT_OFFSET], record[TASK_OUT_FEATURES] = task.out_offset, task.out_features
        record[TASK_RANK], record[TASK_ELEMENT] = task.rank, int(task.dtype)
        record[TASK_A], record[TASK_B] = task.a_offset_bytes, task.b_offset_bytes
    records[:, TASK_SCALE] = np.array([task.scale for task in tasks], np.float64).view(np.int64)
    memory.longs[begin:end] = records.reshape(-1)


def share_count(row_count: int, workers: int, min_rows: int) -> int:
    """How many workers share so many rows where each is to have ``min_rows``; at least one."""
    return min(workers, max(1, row_count // min_rows))


def split_rows(
    tasks: Sequence[DeltaTask], row_count: int, in_features: int, parts: int, min_rows: int
) -> list[tuple[int, int]]:
    """Cut the rows into at most ``parts`` ranges of about equal work, at multiples of ``min_rows``."""
    parts = share_count(row_count, parts, min_rows)
    if parts == 1:
        return [(0, row_count)]
    work = np.zeros(row_count + 1)
    for task in tasks:
        row_work = task.rank * (in_features + task.out_features) + task.out_features
        work[task.row_start + 1 : task.row_stop + 1] += row_work
    done = np.cumsum(work)
    targets = done[-1] * np.arange(1, parts) / parts
    cuts = np.rint(np.searchsorted(done, targets) / min_rows).astype(int) * min_rows
    edges = [0, *sorted({int(cut) for cut in cuts if 0 < cut < row_count}), row_count]
    return list(itertools.pairwise(edges))


class Job:
    """A job in a slot, from ``JobRing.prepare`` until it is released or abandoned.

    Attributes:
        slot, sequence: where it is, and the value of its request flag and of its reply flags when they are set.
        rows: writable [row_count, in_features]: float32, float16, or uint16 for bfloat16 bits. Yours until signalled.
        shares: who computes which rows.
        rows_offset, deltas_offset, request_flag_offset: byte offsets in the mapping, for a CUDA stream.
    """

    def __init__(
        self,
        table: SlotTable,
        memory: SharedMemory,
        slot: int,
        sequence: int,
        shape: tuple[int, int, int],
        element: ElementType,
    ) -> None:
        row_count, in_features, delta_width = shape
        layout = memory.layout
        self._table = table
        self._memory = memory
        self._deltas_shape = (row_count, delta_width)
        self._element = element
        self.slot = slot
        self.sequence = sequence
        self.shares: tuple[Share, ...] = table.shares(slot)
        self.rows_offset = layout.rows_offset + slot * layout.row_bytes
        self.deltas_offset = layout.deltas_offset + slot * layout.delta_bytes
        self.request_flag_offset = layout.request_offset + slot * 4
        self.rows: npt.NDArray[Any] = self._view(self.rows_offset, (row_count, in_features))

    def _view(self, offset: int, shape: tuple[int, int]) -> npt.NDArray[Any]:
        size = shape[0] * shape[1] * self._element.item_bytes
        return self._memory.octets[offset : offset + size].view(self._element.numpy_dtype).reshape(shape)

    def poll(self) -> JobState:
        """Whether the job is complete. Raises RuntimeError when it has been given back."""
        if self._table.state(self.slot, self.sequence) is not SlotState.SIGNALLED:
            return JobState.PENDING
        if not self._table.is_complete(self.slot):
            return JobState.PENDING
        return JobState.FAILED if self._table.has_failed(self.slot) else JobState.DONE

    @property
    def deltas(self) -> npt.NDArray[Any]:
        """[row_count, delta_width], element type of the rows, valid until released. Raises RuntimeError unless DONE."""
        state = self.poll()
        if state is not JobState.DONE:
            raise RuntimeError(f"job {self.sequence} of slot {self.slot} has no deltas: it is {state.value}")
        return self.deltas_buffer

    @property
    def deltas_buffer(self) -> npt.NDArray[Any]:
        """Where ``deltas`` are going to be: for a CUDA stream, which waits for the reply flags itself."""
        return self._view(self.deltas_offset, self._deltas_shape)
