"""Where everything lies in the memory that the engine and its CPU LoRA workers share.

The mapping begins with control words (uint32, one writing process per cache line) and tables (int64, written by the
engine alone); row buffers, delta buffers and the host adapter store follow, each on a page of its own.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

from segue.cpu_lora.config import CpuLoraConfig

MAGIC = 0x41524F4C45554745
VERSION = 1
LINE_BYTES = 64
PAGE_BYTES = 4096
HEADER_BYTES = 512
MAX_RANK = 1024

# A worker's words. It writes them itself, in a cache line of its own.
WORKER_PID, WORKER_READY, WORKER_PROGRESS = 0, 1, 2
# The reply of one share: written by its worker, or for it once it is dead.
REPLY_FLAG, REPLY_STATUS = 0, 1
STATUS_DONE, STATUS_FAILED = 1, 2
# A share as the engine posts it, uint32 words.
SHARE_SEQUENCE, SHARE_GENERATION, SHARE_ROW_START, SHARE_ROW_STOP, SHARE_WORDS = 0, 1, 2, 3, 4
# A job, int64 words.
JOB_IN_FEATURES, JOB_DELTA_WIDTH, JOB_ELEMENT, JOB_TASKS, JOB_LONGS = 0, 1, 2, 3, 8
# A task, 8-byte words; the scale is a float64, the rest are int64.
TASK_ROW_START, TASK_ROW_STOP, TASK_OUT_OFFSET, TASK_OUT_FEATURES, TASK_RANK, TASK_A, TASK_B, TASK_ELEMENT = range(8)
TASK_SCALE, TASK_LONGS = 8, 16


class Geometry(NamedTuple):
    """The layout as compiled code reads it: regions as word indices, buffers as byte offsets."""

    slots: int
    workers: int
    max_tasks: int
    armed_word: int
    worker_word: int
    request_word: int
    reply_word: int
    share_word: int
    job_long: int
    task_long: int
    rows_offset: int
    row_bytes: int
    deltas_offset: int
    delta_bytes: int
    store_offset: int


def _aligned(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLayout:
    """Sizes and byte offsets of all regions. Build it with ``plan``."""

    slots: int
    workers: int
    max_tasks: int
    row_bytes: int
    delta_bytes: int
    store_bytes: int
    armed_offset: int
    worker_offset: int
    request_offset: int
    reply_offset: int
    share_offset: int
    job_offset: int
    task_offset: int
    rows_offset: int
    deltas_offset: int
    store_offset: int
    total_bytes: int

    @classmethod
    def plan(cls, config: CpuLoraConfig) -> SharedLayout:
        """Lay out the memory for ``config``. Buffers of a slot are rounded up to whole pages."""
        row_bytes = _aligned(config.row_bytes, PAGE_BYTES)
        delta_bytes = _aligned(config.delta_bytes, PAGE_BYTES)
        shares = config.slots * config.workers
        sizes = {
            "armed_offset": LINE_BYTES,
            "worker_offset": config.workers * LINE_BYTES,
            "request_offset": config.slots * 4,
            "reply_offset": shares * LINE_BYTES,
            "share_offset": shares * SHARE_WORDS * 4,
            "job_offset": config.slots * JOB_LONGS * 8,
            "task_offset": config.slots * config.max_tasks * TASK_LONGS * 8,
            "rows_offset": config.slots * row_bytes,
            "deltas_offset": config.slots * delta_bytes,
            "store_offset": _aligned(config.store_bytes, PAGE_BYTES),
        }
        offsets: dict[str, int] = {}
        position = HEADER_BYTES
        for region, size_bytes in sizes.items():
            position = _aligned(position, PAGE_BYTES if region in _BUFFERS else LINE_BYTES)
            offsets[region] = position
            position += size_bytes
        return cls(
            slots=config.slots,
            workers=config.workers,
            max_tasks=config.max_tasks,
            row_bytes=row_bytes,
            delta_bytes=delta_bytes,
            store_bytes=config.store_bytes,
            total_bytes=_aligned(position, PAGE_BYTES),
            **offsets,
        )

    def header(self) -> tuple[int, ...]:
        """The int64 words at the beginning of the memory: magic, version, then every field in order."""
        return (MAGIC, VERSION, *astuple(self))

    @classmethod
    def from_header(cls, words: tuple[int, ...]) -> SharedLayout:
        """Read a layout back. Raises ValueError when the memory is not ours or of another version."""
        names = [field.name for field in fields(cls)]
        if len(words) < len(names) + 2 or words[0] != MAGIC:
            raise ValueError("this memory is not a CPU LoRA mapping: wrong magic number")
        if words[1] != VERSION:
            raise ValueError(f"this memory has layout version {words[1]}, this code reads version {VERSION}")
        return cls(**dict(zip(names, words[2:], strict=False)))

    def regions(self) -> dict[str, tuple[int, int]]:
        """Begin and end byte of each region, buffers by slot."""
        shares = self.slots * self.workers
        spans = {
            "header": (0, HEADER_BYTES),
            "armed": (self.armed_offset, LINE_BYTES),
            "workers": (self.worker_offset, self.workers * LINE_BYTES),
            "requests": (self.request_offset, self.slots * 4),
            "replies": (self.reply_offset, shares * LINE_BYTES),
            "shares": (self.share_offset, shares * SHARE_WORDS * 4),
            "jobs": (self.job_offset, self.slots * JOB_LONGS * 8),
            "tasks": (self.task_offset, self.slots * self.max_tasks * TASK_LONGS * 8),
            "store": (self.store_offset, self.store_bytes),
        }
        for slot in range(self.slots):
            spans[f"rows {slot}"] = (self.rows_offset + slot * self.row_bytes, self.row_bytes)
            spans[f"deltas {slot}"] = (self.deltas_offset + slot * self.delta_bytes, self.delta_bytes)
        return {name: (begin, begin + size) for name, (begin, size) in spans.items()}

    def geometry(self) -> Geometry:
        """The layout for compiled code."""
        return Geometry(
            slots=self.slots,
            workers=self.workers,
            max_tasks=self.max_tasks,
            armed_word=self.armed_offset // 4,
            worker_word=self.worker_offset // 4,
            request_word=self.request_offset // 4,
            reply_word=self.reply_offset // 4,
            share_word=self.share_offset // 4,
            job_long=self.job_offset // 8,
            task_long=self.task_offset // 8,
            rows_offset=self.rows_offset,
            row_bytes=self.row_bytes,
            deltas_offset=self.deltas_offset,
            delta_bytes=self.delta_bytes,
            store_offset=self.store_offset,
        )


_BUFFERS = ("rows_offset", "deltas_offset", "store_offset")
