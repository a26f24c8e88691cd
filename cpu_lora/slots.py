"""The book of job slots: which are in use, by which shares, and what has been answered."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from segue.cpu_lora.arming import Arming
from segue.cpu_lora.atomics import all_equal, observe, publish
from segue.cpu_lora.layout import (
    LINE_BYTES,
    REPLY_FLAG,
    REPLY_STATUS,
    SHARE_GENERATION,
    SHARE_ROW_START,
    SHARE_ROW_STOP,
    SHARE_SEQUENCE,
    SHARE_WORDS,
    STATUS_FAILED,
)
from segue.cpu_lora.memory import SharedMemory

_LINE_WORDS = LINE_BYTES // 4


class SlotState(Enum):
    """Who a slot waits for. Whether a signalled job is complete is read from its flags, not kept here."""

    FREE = "free"
    PREPARED = "prepared"
    SIGNALLED = "signalled"
    ABANDONED = "abandoned"


_TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.PREPARED}),
    SlotState.PREPARED: frozenset({SlotState.SIGNALLED, SlotState.FREE}),
    SlotState.SIGNALLED: frozenset({SlotState.ABANDONED, SlotState.FREE}),
    SlotState.ABANDONED: frozenset({SlotState.FREE}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The rows of a job that one life of one worker computes.

    ``reply_flag_offset`` is the byte offset of the uint32 that becomes the job's sequence number when it is answered.
    """

    worker: int
    generation: int
    row_start: int
    row_stop: int
    reply_flag_offset: int


@dataclass(slots=True)
class _Slot:
    state: SlotState
    sequence: int
    shares: tuple[Share, ...]
    flags: npt.NDArray[np.int64]  # word indices that all hold `sequence` when the job is complete


class SlotTable:
    """Slots and their flags in shared memory.

    ``lock`` guards every change: the engine's thread posts and releases, the watchdog answers for the dead. A share is
    posted and its worker's death is recorded under it, so that no share can miss the death of its worker.
    """

    def __init__(self, memory: SharedMemory, arming: Arming) -> None:
        self.lock = threading.RLock()
        self._memory = memory
        self._geometry = memory.layout.geometry()
        self._arming = arming
        self._slots = [_Slot(SlotState.FREE, 0, (), np.zeros(0, np.int64)) for _ in range(memory.layout.slots)]

    def _move(self, slot: int, state: SlotState) -> None:
        entry = self._slots[slot]
        if state not in _TRANSITIONS[entry.state]:
            raise RuntimeError(f"slot {slot} cannot go from {entry.state.value} to {state.value}")
        if entry.state is SlotState.FREE:
            self._arming.arm()
        elif state is SlotState.FREE:
            self._arming.disarm()
        entry.state = state

    def state(self, slot: int, sequence: int) -> SlotState:
        """State of a slot's job. Raises RuntimeError when the slot holds that job no more."""
        entry = self._slots[slot]
        if entry.sequence != sequence or entry.state in (SlotState.FREE, SlotState.ABANDONED):
            raise RuntimeError(f"job {sequence} of slot {slot} has been given back")
        return entry.state

    def free_slot(self) -> int | None:
        """A free slot, after taking back abandoned ones whose shares have all answered."""
        with self.lock:
            self.reclaim()
            return next((i for i, entry in enumerate(self._slots) if entry.state is SlotState.FREE), None)

    def free_slots(self) -> int:
        """Number of free slots, after taking back abandoned ones whose shares have all answered."""
        with self.lock:
            self.reclaim()
            return sum(entry.state is SlotState.FREE for entry in self._slots)

    def occupy(self, slot: int, parts: Sequence[tuple[int, int, int, int]]) -> int:
        """Give a free slot a new sequence number and these shares (worker, generation, first row, end row)."""
        with self.lock:
            self._move(slot, SlotState.PREPARED)
            entry, g = self._slots[slot], self._geometry
            # Zero is what the flags of a new mapping hold, so it numbers no job.
            entry.sequence = entry.sequence % 0xFFFFFFFF + 1
            words = self._memory.words
            shares, flags = [], [g.request_word + slot]
            for worker, generation, row_start, row_stop in parts:
                at = g.share_word + (slot * g.workers + worker) * SHARE_WORDS
                words[at + SHARE_GENERATION] = generation
                words[at + SHARE_ROW_START] = row_start
                words[at + SHARE_ROW_STOP] = row_stop
                publish(words, at + SHARE_SEQUENCE, entry.sequence)
                flag = g.reply_word + (slot * g.workers + worker) * _LINE_WORDS + REPLY_FLAG
                flags.append(flag)
                shares.append(
                    Share(
                        worker=worker,
                        generation=generation,
                        row_start=row_start,
                        row_stop=row_stop,
                        reply_flag_offset=flag * 4,
                    )
                )
            entry.shares, entry.flags = tuple(shares), np.array(flags, np.int64)
            return entry.sequence

    def shares(self, slot: int) -> tuple[Share, ...]:
        """The shares of a slot's job."""
        return self._slots[slot].shares

    def flags(self, slot: int) -> npt.NDArray[np.int64]:
        """Word indices, request flag and reply flags, that all hold the sequence number when the job is complete."""
        return self._slots[slot].flags

    def signal(self, slot: int, *, write: bool) -> None:
        """The request flag is set now (``write``) or will be by someone else."""
        with self.lock:
            self._move(slot, SlotState.SIGNALLED)
            if write:
                publish(self._memory.words, self._geometry.request_word + slot, self._slots[slot].sequence)

    def is_complete(self, slot: int) -> bool:
        """Whether the request flag is set and every share has been answered."""
        entry = self._slots[slot]
        return bool(all_equal(self._memory.words, entry.flags, 0, len(entry.flags), entry.sequence))

    def has_failed(self, slot: int) -> bool:
        """Whether a share of a complete job was answered for a dead worker."""
        words = self._memory.words
        first = REPLY_STATUS - REPLY_FLAG
        return any(words[share.reply_flag_offset // 4 + first] == STATUS_FAILED for share in self._slots[slot].shares)

    def release(self, slot: int) -> None:
        """Free the slot of a complete job. Raises RuntimeError when shares are unanswered."""
        with self.lock:
            if not self.is_complete(slot):
                raise RuntimeError(f"slot {slot} has unanswered shares: wait for the job or abandon it")
            self._move(slot, SlotState.FREE)

    def abandon(self, slot: int) -> None:
        """Free the slot now if nobody will touch it any more, else when its last share has answered."""
        with self.lock:
            if self._slots[slot].state is SlotState.PREPARED:
                self._move(slot, SlotState.FREE)
            elif self._slots[slot].state is SlotState.SIGNALLED:
                self._move(slot, SlotState.ABANDONED)
            self.reclaim()

    def reclaim(self) -> None:
        """Free abandoned slots whose shares have all answered."""
        with self.lock:
            for slot, entry in enumerate(self._slots):
                if entry.state is SlotState.ABANDONED and self.is_complete(slot):
                    self._move(slot, SlotState.FREE)

    def _unanswered(self) -> Iterator[tuple[int, _Slot, Share]]:
        for slot, entry in enumerate(self._slots):
            if entry.state is SlotState.FREE:
                continue
            for share in entry.shares:
                if observe(self._memory.words, share.reply_flag_offset // 4) != entry.sequence:
                    yield slot, entry, share

    def waiting_workers(self) -> frozenset[int]:
        """Workers with an unanswered share whose request flag is seen set."""
        with self.lock:
            words, request_word = self._memory.words, self._geometry.request_word
            return frozenset(
                share.worker
                for slot, entry, share in self._unanswered()
                if observe(words, request_word + slot) == entry.sequence
            )

    def fail_shares(self, worker: int) -> int:
        """Answer all unanswered shares of a worker that is dead FAILED, signalled or not; returns how many."""
        with self.lock:
            lost = [(entry, share) for _, entry, share in self._unanswered() if share.worker == worker]
            for entry, share in lost:
                flag = share.reply_flag_offset // 4
                self._memory.words[flag - REPLY_FLAG + REPLY_STATUS] = STATUS_FAILED
                publish(self._memory.words, flag, entry.sequence)
            return len(lost)

    def check(self) -> None:
        """Raise AssertionError unless the book agrees with itself and with the shares in shared memory."""
        with self.lock:
            words, g = self._memory.words, self._geometry
            used = [entry for entry in self._slots if entry.state is not SlotState.FREE]
            assert self._arming.count >= len(used), "every slot in use holds the workers armed"
            for slot, entry in enumerate(self._slots):
                if entry.state is SlotState.FREE:
                    continue
                owners = [share.worker for share in entry.shares]
                assert owners, f"slot {slot} has no share"
                assert len(set(owners)) == len(owners), f"slot {slot} gives a worker two shares"
                rows = [(share.row_start, share.row_stop) for share in entry.shares]
                assert rows[0][0] == 0, f"slot {slot} does not begin at row 0"
                assert all(a < b for a, b in rows), f"slot {slot} has an empty share"
                assert all(a[1] == b[0] for a, b in itertools.pairwise(rows)), f"slot {slot}: rows {rows}"
                for share in entry.shares:
                    at = g.share_word + (slot * g.workers + share.worker) * SHARE_WORDS
                    posted = tuple(int(word) for word in words[at : at + SHARE_WORDS])
                    expected = (entry.sequence, share.generation, share.row_start, share.row_stop)
                    assert posted == expected, f"slot {slot}: share is {posted}, should be {expected}"
                if entry.state is SlotState.PREPARED:
                    assert observe(words, g.request_word + slot) != entry.sequence, f"slot {slot} is flagged early"
