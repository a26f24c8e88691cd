"""The memory in which reader threads share what there is to read: int64 words, and the system calls that guard them.

Compiled code follows addresses from the board to the reads that wait, and from a read to its parts. Whoever gives an
address away keeps the array until nothing refers to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from segue.compiled import INT, LONGS, carray, compiled, types
from segue.cpu_lora.native import intrinsic

Words = npt.NDArray[np.int64]

LAYER_CHARGE = 720_720
"""What a layer is charged at stride 1. It can be divided by all numbers of parts up to 16."""

# -- the board: words of it, and from BOARD_SLOTS on SLOT_WORDS for each thread ----------------------------------------

BOARD_MUTEX = 0
# pthread_mutex_t and pthread_cond_t have at most 64 bytes on 64-bit machines, and all zeros is what they begin as.
BOARD_HAS_WORK = 8
BOARD_HAS_READS = 16
BOARD_ONE = 24  # what is written to wake the loop
BOARD_WAKE_FD = 25
BOARD_CLOSING = 26
BOARD_FIRST = 27  # the order's reads by their addresses, linked in the order of their arrival; 0 for none
BOARD_LAST = 28
BOARD_CLOCK = 29
BOARD_IDLE = 30  # threads that wait for work
BOARD_THREADS = 31
BOARD_WANTED_THREADS = 32
BOARD_OVERDUE = 33  # threads that are overdue, for which others may stand in
BOARD_READS = 34  # that have not ended
BOARD_ADVANCES = 35  # grows whenever a layer of any read is there
BOARD_TOUCHABLE_BYTES = 36
BOARD_LAST_BEGIN_NS = 37
BOARD_ITEM_BYTES = 38
BOARD_FIRST_NOT_FINITE = 39
BOARD_ALL_IN_PYTHON = 40  # whether Python is to read every part
BOARD_WATCH_TIME = 41  # a timespec for the thread that watches
BOARD_SLOTS = 48

SLOT_WORDS = 8
SLOT_READ = 0  # the address of the read that the thread is at; 0 for none
SLOT_READ_ID = 1
SLOT_PART = 2
SLOT_BEGIN_NS = 3
SLOT_IS_OVERDUE = 4
SLOT_WAITS_FOR_MEMORY = 5
SLOT_TIME = 6  # a timespec

# -- a read: words of it, then for each layer the parts that are not there, then for each layer when it was ------------

READ_NEXT = 0
READ_ID = 1
READ_TAG = 2
READ_STRIDE = 3
READ_IS_IN_ORDER = 4
READ_IS_OVER = 5
READ_NEXT_PART = 6
READ_PARTS = 7
READ_LAYERS = 8
READ_READY_LAYERS = 9  # how many of the first layers are there
READ_UNDER_WAY = 10  # threads that are at it
READ_OVERDUE = 11  # of them overdue
READ_BEGIN_NS = 12
READ_END_NS = 13
READ_DESCRIPTOR = 14
READ_COPY_OFFSET = 15
READ_STOP_BYTES = 16
READ_PART_TABLE = 17
READ_RUNS = 18
READ_PUT_NS = 19
READ_UNREAD = 24

_CLOCK_MONOTONIC = 1
_NS_PER_SECOND = 1_000_000_000

_ADDRESS = types.uintp
_mutex_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(_ADDRESS))
_mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(_ADDRESS))
_cond_wait = types.ExternalFunction("pthread_cond_wait", types.int32(_ADDRESS, _ADDRESS))
_cond_signal = types.ExternalFunction("pthread_cond_signal", types.int32(_ADDRESS))
_cond_broadcast = types.ExternalFunction("pthread_cond_broadcast", types.int32(_ADDRESS))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, _ADDRESS))
_write = types.ExternalFunction("write", types.intp(types.int32, _ADDRESS, types.uintp))


@intrinsic
def _pointer(_typing: Any, _address: Any) -> Any:
    """An address as a pointer to int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@compiled(LONGS(INT, INT))
def words_at(address: int, count: int) -> Words:
    """The words at an address, which stay their owner's."""
    return carray(_pointer(address), (count,))  # type: ignore[no-any-return]


@compiled(types.void(LONGS))
def lock(board: Words) -> None:
    """Guard all words of a board and of its reads."""
    _mutex_lock(board.ctypes.data + BOARD_MUTEX * 8)


@compiled(types.void(LONGS))
def unlock(board: Words) -> None:
    _mutex_unlock(board.ctypes.data + BOARD_MUTEX * 8)


@compiled(types.void(LONGS, INT))
def wait_for(board: Words, condition: int) -> None:
    """Give the lock away until ``condition`` (BOARD_HAS_...) is signalled, or for no reason."""
    _cond_wait(board.ctypes.data + condition * 8, board.ctypes.data + BOARD_MUTEX * 8)


@compiled(types.void(LONGS, INT))
def signal_one(board: Words, condition: int) -> None:
    _cond_signal(board.ctypes.data + condition * 8)


@compiled(types.void(LONGS, INT))
def signal_all(board: Words, condition: int) -> None:
    _cond_broadcast(board.ctypes.data + condition * 8)


@compiled(INT(LONGS, INT))
def monotonic_ns(board: Words, time_word: int) -> int:
    """``time.monotonic_ns``, by way of two words of the board that nobody else uses."""
    _clock_gettime(_CLOCK_MONOTONIC, board.ctypes.data + time_word * 8)
    return board[time_word] * _NS_PER_SECOND + board[time_word + 1]  # type: ignore[no-any-return]


@compiled(types.void(LONGS))
def wake_loop(board: Words) -> None:
    """Make BOARD_WAKE_FD, an eventfd, readable. Whoever closes the board may close it too."""
    if board[BOARD_CLOSING] == 0:
        _write(board[BOARD_WAKE_FD], board.ctypes.data + BOARD_ONE * 8, 8)
