"""A worker's part in the job ring, taken step by step inside the test's own process."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from segue.cpu_lora import SharedMemory
from segue.cpu_lora.atomics import observe, publish
from segue.cpu_lora.layout import (
    JOB_DELTA_WIDTH,
    JOB_IN_FEATURES,
    JOB_LONGS,
    LINE_BYTES,
    REPLY_FLAG,
    REPLY_STATUS,
    SHARE_ROW_START,
    SHARE_ROW_STOP,
    SHARE_WORDS,
    STATUS_DONE,
    WORKER_READY,
)
from segue.cpu_lora.serve import _is_mine, present_requests


def mark(sequence: int, worker: int) -> float:
    """What a worker writes for a job: whole numbers that float32 holds exactly."""
    return float(sequence % 10_000 * 10 + worker)


class FakeWorker:
    """One life of a worker: it goes by the flags as ``serve_while_armed`` does, but writes its mark in place of deltas.

    ``claim`` is the slot and the sequence number of the share that it computes, float32 rows and deltas.
    """

    def __init__(self, memory: SharedMemory, index: int, generation: int) -> None:
        self._memory = memory
        self._geometry = memory.layout.geometry()
        self.index = index
        self.generation = generation
        self.claim: tuple[int, int] | None = None
        self._seen = present_requests(memory.words, self._geometry)
        own_word = self._geometry.worker_word + index * (LINE_BYTES // 4)
        publish(memory.words, own_word + WORKER_READY, generation)

    def look(self) -> None:
        """Claim the first share that is flagged and this life's, if there is one."""
        assert self.claim is None, "a worker computes one share at a time"
        words, g = self._memory.words, self._geometry
        for slot in range(g.slots):
            flag = int(observe(words, g.request_word + slot))
            if flag == self._seen[slot]:
                continue
            self._seen[slot] = flag
            if _is_mine(words, g, slot, self.index, flag, self.generation):
                self.claim = (slot, flag)
                return

    def compute(self) -> npt.NDArray[np.float32]:
        """Write the mark to the deltas of the claimed rows; returns the rows as they are read."""
        assert self.claim is not None
        slot, sequence = self.claim
        g = self._geometry
        share = g.share_word + (slot * g.workers + self.index) * SHARE_WORDS
        start, stop = (int(self._memory.words[share + word]) for word in (SHARE_ROW_START, SHARE_ROW_STOP))
        job = self._memory.longs[g.job_long + slot * JOB_LONGS :][:JOB_LONGS]
        self._matrix(g.deltas_offset + slot * g.delta_bytes, stop, job[JOB_DELTA_WIDTH])[start:] = mark(
            sequence, self.index
        )
        return self._matrix(g.rows_offset + slot * g.row_bytes, stop, job[JOB_IN_FEATURES])[start:].copy()

    def reply(self) -> None:
        """Write the deltas once more, for these are the latest writes that there can be, and answer the share."""
        assert self.claim is not None
        self.compute()
        (slot, sequence), self.claim = self.claim, None
        line = self._geometry.reply_word + (slot * self._geometry.workers + self.index) * (LINE_BYTES // 4)
        self._memory.words[line + REPLY_STATUS] = STATUS_DONE
        publish(self._memory.words, line + REPLY_FLAG, sequence)

    def _matrix(self, offset_bytes: int, rows: int, columns: Any) -> npt.NDArray[np.float32]:
        size = rows * int(columns)
        return self._memory.floats[offset_bytes // 4 : offset_bytes // 4 + size].reshape(rows, int(columns))
