"""A read under way: what its threads and the loop know of it, in words that compiled code works on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from segue.engine.lora import read_board
from segue.engine.lora import read_words as at
from segue.engine.lora.adapter_path import identity_of
from segue.engine.lora.read_parts import PartTable
from segue.engine.lora.transfer import LayerRead, ReadJob, failure_message


@dataclass(slots=True, eq=False)
class Reading:
    """A job, its parts, and ``words``, the read's words on the board. ``reported_layers`` is the loop's alone."""

    job: ReadJob
    table: PartTable
    words: at.Words
    reported_layers: int = 0

    @classmethod
    def of(cls, number: int, job: ReadJob, table: PartTable, stride: int) -> Reading:
        """One that nobody is at yet, and the only one with this number."""
        layers = len(table.layer_parts)
        words = np.zeros(at.READ_UNREAD + 2 * layers, dtype=np.int64)
        words[at.READ_ID] = number
        words[at.READ_STRIDE] = stride
        words[at.READ_PARTS] = len(table)
        words[at.READ_LAYERS] = layers
        words[at.READ_DESCRIPTOR] = job.descriptor
        words[at.READ_COPY_OFFSET] = job.copy_offset
        words[at.READ_STOP_BYTES] = job.copy_offset + job.plan.host_bytes
        words[at.READ_PART_TABLE] = table.parts.ctypes.data
        words[at.READ_RUNS] = table.runs.ctypes.data
        words[at.READ_PUT_NS] = time.monotonic_ns()
        words[at.READ_UNREAD : at.READ_UNREAD + layers] = table.layer_parts
        return cls(job, table, words)

    @property
    def number(self) -> int:
        """No other read that has not ended has it."""
        return int(self.words[at.READ_ID])

    @property
    def stop_bytes(self) -> int:
        """Where in the host store its bytes end."""
        return self.job.copy_offset + self.job.plan.host_bytes

    @property
    def put_seconds(self) -> float:
        """When it was made, by the monotonic clock."""
        return int(self.words[at.READ_PUT_NS]) / 1e9

    @property
    def seconds(self) -> float:
        """From the beginning of its first part until its last layer was there."""
        return max(0, int(self.words[at.READ_END_NS] - self.words[at.READ_BEGIN_NS])) / 1e9

    def new_layers(self) -> list[LayerRead]:
        """Those that have come since the last call, in order."""
        ready = read_board.observe_word(self.words, at.READ_READY_LAYERS)
        first, self.reported_layers = self.reported_layers, ready
        if first == ready:
            return []
        start = at.READ_UNREAD + len(self.table.layer_parts)
        return [
            LayerRead(job=self.job, layer=layer, monotonic_seconds=stamp / 1e9)
            for layer, stamp in enumerate(self.words[start + first : start + ready].tolist(), first)
        ]


def verify(job: ReadJob) -> str | None:
    """Why what was read may not be one content of the file, if so."""
    try:
        now = os.fstat(job.descriptor)
    except OSError as error:
        return failure_message(error, "read")
    identity = identity_of(now)
    # Losing its last name moves a file's ctime alone: it was replaced by a rename or deleted, its content is the same.
    if identity == job.identity or (now.st_nlink == 0 and identity[:4] == job.identity[:4]):
        return None
    return "the weights file changed while it was read"
