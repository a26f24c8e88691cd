"""The compiled part of a worker: wait for requests, compute its share of each, reply."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from segue.compiled import DOUBLES, FLOATS, HALVES, LONGS, WORDS, compiled, types
from segue.cpu_lora.atomics import (
    cpu_pause,
    load_acquire,
    sched_yield,
    store_release,
    usleep,
)
from segue.cpu_lora.kernels import ROW_TILE, SCRATCH, lora_delta
from segue.cpu_lora.layout import (
    JOB_DELTA_WIDTH,
    JOB_ELEMENT,
    JOB_IN_FEATURES,
    JOB_LONGS,
    JOB_TASKS,
    LINE_BYTES,
    REPLY_FLAG,
    REPLY_STATUS,
    SHARE_GENERATION,
    SHARE_ROW_START,
    SHARE_ROW_STOP,
    SHARE_SEQUENCE,
    SHARE_WORDS,
    STATUS_DONE,
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
    WORKER_PROGRESS,
    Geometry,
)

_GEOMETRY = types.NamedUniTuple(types.int64, len(Geometry._fields), Geometry)
_LINE_WORDS = LINE_BYTES // 4

# An idle worker looks this often with the spin-wait hint between, then this often giving up its core between.
_PAUSES = 2_000
_YIELDS = 2_000
_NAP_MICROSECONDS = 50


@compiled(types.void(WORDS, LONGS, DOUBLES, FLOATS, HALVES, _GEOMETRY, types.int64, types.int64, SCRATCH))
def _run_share(
    words: Any, longs: Any, doubles: Any, floats: Any, halves: Any, g: Any, slot: int, worker: int, scratch: Any
) -> None:
    """Compute the rows of one share, all tasks that touch them; progress is counted per row tile."""
    share = g.share_word + (slot * g.workers + worker) * SHARE_WORDS
    share_start, share_stop = np.int64(words[share + SHARE_ROW_START]), np.int64(words[share + SHARE_ROW_STOP])
    job = g.job_long + slot * JOB_LONGS
    in_features, width, element = longs[job + JOB_IN_FEATURES], longs[job + JOB_DELTA_WIDTH], longs[job + JOB_ELEMENT]
    item = 4 if element == 0 else 2
    rows_offset = g.rows_offset + slot * g.row_bytes
    deltas_offset = g.deltas_offset + slot * g.delta_bytes
    progress = g.worker_word + worker * _LINE_WORDS + WORKER_PROGRESS
    for index in range(longs[job + JOB_TASKS]):
        task = g.task_long + (slot * g.max_tasks + index) * TASK_LONGS
        start = max(share_start, longs[task + TASK_ROW_START])
        stop = min(share_stop, longs[task + TASK_ROW_STOP])
        for row in range(start, stop, ROW_TILE):
            y_bytes = deltas_offset + (row * width + longs[task + TASK_OUT_OFFSET]) * item
            lora_delta(
                floats, halves, element, rows_offset + row * in_features * item, y_bytes, width,
                min(ROW_TILE, stop - row), in_features, longs[task + TASK_OUT_FEATURES], longs[task + TASK_ELEMENT],
                longs[task + TASK_RANK], g.store_offset + longs[task + TASK_A], g.store_offset + longs[task + TASK_B],
                doubles[task + TASK_SCALE], scratch,
            )  # fmt: skip
            store_release(words, progress, words[progress] + np.uint32(1))


@compiled(types.boolean(WORDS, _GEOMETRY, types.int64, types.int64, types.uint32, types.uint32))
def _is_mine(words: Any, g: Any, slot: int, worker: int, flag: int, generation: int) -> bool:
    """Whether the request with this flag has a share for this worker in its present life.

    The engine names the sequence number in a share before it writes the same number to the request flag, and rewrites
    neither before the share is answered, so a share of another job or an earlier life never matches.
    """
    share = g.share_word + (slot * g.workers + worker) * SHARE_WORDS
    if load_acquire(words, share + SHARE_SEQUENCE) != flag:
        return False
    return bool(load_acquire(words, share + SHARE_GENERATION) == generation)


@compiled(
    types.void(
        WORDS,
        LONGS,
        DOUBLES,
        FLOATS,
        HALVES,
        _GEOMETRY,
        types.int64,
        types.uint32,
        types.boolean,
        WORDS,
        SCRATCH,
    )
)
def serve_while_armed(
    words: Any,
    longs: Any,
    doubles: Any,
    floats: Any,
    halves: Any,
    g: Any,
    worker: int,
    generation: int,
    naps: bool,
    seen: Any,
    scratch: Any,
) -> None:
    """Answer requests, in whatever order their flags come, until the armed word is zero.

    ``seen`` [slots] holds each slot's last known request flag. With ``naps`` a long idle worker sleeps instead of
    yielding: for machines where it has no core of its own.
    """
    idle = 0
    while load_acquire(words, g.armed_word) != 0:
        worked = False
        for slot in range(g.slots):
            flag = load_acquire(words, g.request_word + slot)
            if flag == seen[slot]:
                continue
            seen[slot] = flag
            if not _is_mine(words, g, slot, worker, flag, generation):
                continue
            _run_share(words, longs, doubles, floats, halves, g, slot, worker, scratch)
            reply = g.reply_word + (slot * g.workers + worker) * _LINE_WORDS
            words[reply + REPLY_STATUS] = np.uint32(STATUS_DONE)
            store_release(words, reply + REPLY_FLAG, flag)
            worked = True
        if worked:
            idle = 0
            continue
        idle += 1
        if idle < _PAUSES:
            cpu_pause()
        elif naps and idle >= _PAUSES + _YIELDS:
            usleep(np.uint32(_NAP_MICROSECONDS))
        else:
            sched_yield()


@compiled(types.void(WORDS, _GEOMETRY, WORDS))
def _read_requests(words: Any, g: Any, seen: Any) -> None:
    for slot in range(g.slots):
        seen[slot] = load_acquire(words, g.request_word + slot)


def present_requests(words: npt.NDArray[np.uint32], geometry: Geometry) -> npt.NDArray[np.uint32]:
    """The request flags as they stand, uint32 [slots]: what a fresh worker takes as already answered."""
    seen = np.zeros(geometry.slots, np.uint32)
    _read_requests(words, geometry, seen)
    return seen
