"""What reader threads do next, decided by themselves in compiled code without the GIL.

Whose turn it is says ``read_order.py``, part by part: each part charges its read the share that it is of its layer,
times the read's stride. A thread asks for the interpreter when a part is not as usual, when a read is complete, and not
otherwise. All of it happens under one mutex, which is never held while the GIL is waited for.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from segue.compiled import HALVES, INT, LONGS, WORDS, compiled, types
from segue.cpu_lora.atomics import load_acquire, store_release, usleep
from segue.engine.lora import read_order as order
from segue.engine.lora import read_words as at
from segue.engine.lora.file_runs import PIECE_BYTES, RUN_LONGS, read_into
from segue.engine.lora.read_parts import PART_LONGS
from segue.engine.lora.read_words import Words


class Outcome(IntEnum):
    """Why a thread comes back to Python: it is to end; a part is to be read there; all of a read is there, and the
    thread still at it; a read that failed or was cancelled has no thread any more. NOTHING: it is to go on."""

    NOTHING = 0
    LEAVE = 1
    PART = 2
    COMPLETE = 3
    ENDED = 4


_NOTHING, _LEAVE, _PART = int(Outcome.NOTHING), int(Outcome.LEAVE), int(Outcome.PART)
_COMPLETE, _ENDED = int(Outcome.COMPLETE), int(Outcome.ENDED)
_ADVANCED = 8


# -- parts: with the lock ----------------------------------------------------------------------------------------------


@compiled(INT(LONGS, INT, INT))
def _claim(board: Words, slot: int, address: int) -> int:
    """Begin a read's next part; NOTHING, or PART where Python has to read it."""
    read = at.words_at(address, at.READ_UNREAD)
    part = read[at.READ_NEXT_PART]
    words = at.words_at(read[at.READ_PART_TABLE] + part * PART_LONGS * 8, PART_LONGS)
    order.charge(board, read, words[5])
    read[at.READ_NEXT_PART] = part + 1
    read[at.READ_UNDER_WAY] += 1
    if part + 1 == read[at.READ_PARTS]:
        order.leave(board, read)
    now = at.monotonic_ns(board, slot + at.SLOT_TIME)
    if read[at.READ_BEGIN_NS] == 0:
        read[at.READ_BEGIN_NS] = now
    board[at.BOARD_LAST_BEGIN_NS] = now
    board[slot + at.SLOT_READ] = address
    board[slot + at.SLOT_READ_ID] = read[at.READ_ID]
    board[slot + at.SLOT_PART] = part
    board[slot + at.SLOT_BEGIN_NS] = now
    board[slot + at.SLOT_IS_OVERDUE] = 0
    waits = read[at.READ_STOP_BYTES] > board[at.BOARD_TOUCHABLE_BYTES]
    board[slot + at.SLOT_WAITS_FOR_MEMORY] = int(waits)
    return _PART if waits or words[4] >= 0 or board[at.BOARD_ALL_IN_PYTHON] else _NOTHING


@compiled(INT(LONGS, INT, LONGS))
def _count(board: Words, slot: int, read: Words) -> int:
    """Take account of the part that a thread has read; ADVANCED where layers are there now, with COMPLETE for the
    last."""
    layers, address = read[at.READ_LAYERS], read.ctypes.data
    unread = at.words_at(address + at.READ_UNREAD * 8, 2 * layers)
    layer = at.words_at(read[at.READ_PART_TABLE] + board[slot + at.SLOT_PART] * PART_LONGS * 8, 1)[0]
    unread[layer] -= 1
    ready = read[at.READ_READY_LAYERS]
    if layer != ready or unread[layer] > 0:
        return _NOTHING
    now = at.monotonic_ns(board, slot + at.SLOT_TIME)
    while ready < layers and unread[ready] == 0:
        unread[layers + ready] = now
        ready += 1
    store_release(read, at.READ_READY_LAYERS, ready)
    store_release(board, at.BOARD_ADVANCES, board[at.BOARD_ADVANCES] + 1)
    if ready < layers:
        return _ADVANCED
    read[at.READ_END_NS] = now
    return _ADVANCED | _COMPLETE


@compiled(INT(LONGS, INT, LONGS))
def _leave(board: Words, slot: int, read: Words) -> int:
    """A thread has come back from a part; ENDED where it was the last at a read that is over."""
    board[slot + at.SLOT_READ] = 0
    read[at.READ_UNDER_WAY] -= 1
    if board[slot + at.SLOT_IS_OVERDUE]:
        board[at.BOARD_OVERDUE] -= 1
        read[at.READ_OVERDUE] -= 1
        has_more = read[at.READ_NEXT_PART] < read[at.READ_PARTS]
        if read[at.READ_OVERDUE] == 0 and has_more and read[at.READ_IS_OVER] == 0:
            order.enter(board, read)
        # Some of those that wait have to end.
        at.signal_all(board, at.BOARD_HAS_WORK)
    if read[at.READ_IS_OVER] and read[at.READ_UNDER_WAY] == 0:
        board[at.BOARD_READS] -= 1
        return _ENDED
    return _NOTHING


@compiled(INT(LONGS, INT, types.boolean))
def _finish(board: Words, slot: int, succeeded: bool) -> int:
    """A thread has read its part, or has not; it stays at a read that is complete."""
    read = at.words_at(board[slot + at.SLOT_READ], at.READ_UNREAD)
    outcome = _NOTHING
    if succeeded and read[at.READ_IS_OVER] == 0:
        outcome = _count(board, slot, read)
    if outcome & _COMPLETE == _COMPLETE:
        return outcome
    return outcome | _leave(board, slot, read)


# -- what threads call, without the GIL --------------------------------------------------------------------------------


@compiled(types.boolean(LONGS, INT, HALVES, WORDS))
def _read_part(board: Words, slot: int, halves: npt.NDArray[np.uint16], words: npt.NDArray[np.uint32]) -> bool:
    """Read a part into place, if each read brings all that it asks for and all is finite."""
    read = at.words_at(board[slot + at.SLOT_READ], at.READ_UNREAD)
    part = at.words_at(read[at.READ_PART_TABLE] + board[slot + at.SLOT_PART] * PART_LONGS * 8, PART_LONGS)
    runs = at.words_at(read[at.READ_RUNS] + part[1] * RUN_LONGS * 8, (part[2] - part[1]) * RUN_LONGS)
    done = read_into(
        read[at.READ_DESCRIPTOR],
        runs,
        read[at.READ_COPY_OFFSET],
        halves,
        words,
        board[at.BOARD_ITEM_BYTES],
        board[at.BOARD_FIRST_NOT_FINITE],
        PIECE_BYTES,
    )
    return bool(done == part[3])


@compiled(INT(LONGS, INT, HALVES, WORDS))
def serve(board: Words, number: int, halves: npt.NDArray[np.uint16], words: npt.NDArray[np.uint32]) -> int:
    """Read part after part as thread ``number``, and wait where there is none, until Python is needed: the Outcome.

    ``halves`` and ``words`` are the host store.
    """
    slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
    outcome = _NOTHING
    at.lock(board)
    while outcome == _NOTHING:
        if (
            board[at.BOARD_CLOSING]
            or board[at.BOARD_THREADS] > board[at.BOARD_WANTED_THREADS] + board[at.BOARD_OVERDUE]
        ):
            board[at.BOARD_THREADS] -= 1
            outcome = _LEAVE
            break
        address = order.whose_turn(board)
        if address == 0:
            board[at.BOARD_IDLE] += 1
            at.wait_for(board, at.BOARD_HAS_WORK)
            board[at.BOARD_IDLE] -= 1
            continue
        outcome = _claim(board, slot, address)
        # A thread that has been woken wakes the next one: whoever puts a read pays for one.
        wakes_another = board[at.BOARD_FIRST] != 0 and board[at.BOARD_IDLE] > 0
        at.unlock(board)
        if wakes_another:
            at.signal_one(board, at.BOARD_HAS_WORK)
        if outcome != _NOTHING:
            return outcome
        is_read = _read_part(board, slot, halves, words)
        at.lock(board)
        if not is_read:
            outcome = _PART
            break
        outcome = _finish(board, slot, True)
        if outcome & _ADVANCED:
            at.unlock(board)
            at.wake_loop(board)
            at.lock(board)
            outcome ^= _ADVANCED
    at.unlock(board)
    return outcome


@compiled(types.boolean(LONGS, INT, INT, INT))
def watch(board: Words, threads: int, late_ns: int, tick_us: int) -> bool:
    """Wait until one of ``threads`` has been at a part for ``late_ns``, or none has begun for so long that might have.

    Looks each ``tick_us`` while there are reads. Whether to go on.
    """
    at.lock(board)
    goes_on, is_late = True, False
    while goes_on and not is_late:
        while board[at.BOARD_READS] == 0 and board[at.BOARD_CLOSING] == 0:
            at.wait_for(board, at.BOARD_HAS_READS)
        if board[at.BOARD_CLOSING] == 0:
            at.unlock(board)
            usleep(tick_us)
            at.lock(board)
        goes_on = board[at.BOARD_CLOSING] == 0
        now = at.monotonic_ns(board, at.BOARD_WATCH_TIME)
        is_late = board[at.BOARD_FIRST] != 0 and now - board[at.BOARD_LAST_BEGIN_NS] >= late_ns
        for number in range(threads):
            slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
            is_late |= board[slot + at.SLOT_READ] != 0 and now - board[slot + at.SLOT_BEGIN_NS] >= late_ns
    at.unlock(board)
    return goes_on


# -- what Python calls, with the GIL: each takes less time than getting it back might ----------------------------------


@compiled(types.void(LONGS, LONGS), nogil=False)
def add(board: Words, read: Words) -> None:
    """Put a read into the order, whose words say all about it."""
    at.lock(board)
    board[at.BOARD_READS] += 1
    order.enter(board, read)
    is_first = board[at.BOARD_READS] == 1
    at.unlock(board)
    # Behind the lock: whoever is woken wants it.
    at.signal_one(board, at.BOARD_HAS_WORK)
    if is_first:
        at.signal_one(board, at.BOARD_HAS_READS)


@compiled(types.void(LONGS, LONGS, INT), nogil=False)
def hasten(board: Words, read: Words, stride: int) -> None:
    """Give a read another stride, and its next turn as if it came now, unless that is later."""
    at.lock(board)
    order.speed_up(board, read, stride)
    at.unlock(board)


@compiled(types.UniTuple(types.boolean, 2)(LONGS, LONGS), nogil=False)
def give_up(board: Words, read: Words) -> tuple[bool, bool]:
    """Begin no more parts of a read; whether it was not over before, and whether it has ended by that."""
    at.lock(board)
    is_new = read[at.READ_IS_OVER] == 0
    read[at.READ_IS_OVER] = 1
    order.leave(board, read)
    has_ended = is_new and read[at.READ_UNDER_WAY] == 0
    if has_ended:
        board[at.BOARD_READS] -= 1
    at.unlock(board)
    return is_new, has_ended


@compiled(INT(LONGS, INT, types.boolean), nogil=False)
def finish(board: Words, number: int, succeeded: bool) -> int:
    """Thread ``number`` has come back from a part that Python was to read: the Outcome."""
    at.lock(board)
    outcome = _finish(board, at.BOARD_SLOTS + number * at.SLOT_WORDS, succeeded)
    at.unlock(board)
    if outcome & _ADVANCED:
        at.wake_loop(board)
    return outcome & ~_ADVANCED


@compiled(types.boolean(LONGS, INT), nogil=False)
def conclude(board: Words, number: int) -> bool:
    """Thread ``number`` leaves a read that is complete, which has ended by that; whether it is good to the end."""
    slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
    at.lock(board)
    read = at.words_at(board[slot + at.SLOT_READ], at.READ_UNREAD)
    is_good = read[at.READ_IS_OVER] == 0
    read[at.READ_IS_OVER] = 1
    _leave(board, slot, read)
    at.unlock(board)
    return bool(is_good)


@compiled(types.void(LONGS, INT), nogil=False)
def raise_touchable(board: Words, stop_bytes: int) -> None:
    """Bytes of the host store below ``stop_bytes`` may be touched."""
    at.lock(board)
    board[at.BOARD_TOUCHABLE_BYTES] = max(board[at.BOARD_TOUCHABLE_BYTES], stop_bytes)
    at.unlock(board)


@compiled(types.void(LONGS, INT), nogil=False)
def memory_is_there(board: Words, number: int) -> None:
    """The part of thread ``number``, which may have waited for memory, begins now."""
    slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
    at.lock(board)
    board[slot + at.SLOT_WAITS_FOR_MEMORY] = 0
    board[slot + at.SLOT_BEGIN_NS] = at.monotonic_ns(board, slot + at.SLOT_TIME)
    at.unlock(board)


@compiled(types.boolean(LONGS, INT, INT), nogil=False)
def mark_overdue(board: Words, number: int, begin_ns: int) -> bool:
    """Let no more threads to the read of a thread that is at the part that it began at ``begin_ns``.

    False if it is not, or was overdue before. Another thread may stand in for it.
    """
    slot = at.BOARD_SLOTS + number * at.SLOT_WORDS
    at.lock(board)
    is_there = board[slot + at.SLOT_READ] != 0 and board[slot + at.SLOT_BEGIN_NS] == begin_ns
    is_new = is_there and board[slot + at.SLOT_IS_OVERDUE] == 0
    if is_new:
        read = at.words_at(board[slot + at.SLOT_READ], at.READ_UNREAD)
        board[slot + at.SLOT_IS_OVERDUE] = 1
        board[at.BOARD_OVERDUE] += 1
        read[at.READ_OVERDUE] += 1
        order.leave(board, read)
    at.unlock(board)
    return bool(is_new)


@compiled(types.boolean(LONGS, INT), nogil=False)
def may_start(board: Words, most_stand_ins: int) -> bool:
    """Count one more thread, if there may be one: as many as are wanted, and others for those that are overdue."""
    at.lock(board)
    stand_ins = min(board[at.BOARD_OVERDUE], most_stand_ins)
    may = board[at.BOARD_THREADS] < board[at.BOARD_WANTED_THREADS] + stand_ins and board[at.BOARD_CLOSING] == 0
    board[at.BOARD_THREADS] += int(may)
    at.unlock(board)
    return bool(may)


@compiled(types.void(LONGS, LONGS), nogil=False)
def look(board: Words, seen: Words) -> None:
    """Copy a board's words, all of one moment."""
    at.lock(board)
    seen[:] = board
    at.unlock(board)


@compiled(types.void(LONGS), nogil=False)
def close(board: Words) -> None:
    """Have all threads come back, each behind the part that it is at."""
    at.lock(board)
    board[at.BOARD_CLOSING] = 1
    at.signal_all(board, at.BOARD_HAS_WORK)
    at.signal_all(board, at.BOARD_HAS_READS)
    at.unlock(board)


@compiled(INT(LONGS, INT), nogil=False)
def observe_word(words: Words, index: int) -> int:
    """A word that others store with release order: what they wrote before is seen after it."""
    return load_acquire(words, index)  # type: ignore[no-any-return]
