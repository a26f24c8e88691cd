"""Whose turn it is to be read: start-time fair queueing over reads that come and go, in compiled code.

Reads in the order of their tags, and of their arrival where those are equal. A read's tag grows by the share of a layer
that it is charged, times its stride. It begins where the read is whose turn it was last, so those that came together go
on side by side, and one that came earlier is never overtaken for good: whoever comes later begins where it is (Goyal,
Vin, Cheng: Start-time Fair Queueing, SIGCOMM 1996). Reads are linked by their addresses in the order of their arrival.
Everything here is called with the board's lock.
"""

from __future__ import annotations

from segue.compiled import INT, LONGS, compiled, types
from segue.engine.lora import read_words as at
from segue.engine.lora.read_words import Words


@compiled(types.void(LONGS, LONGS))
def enter(board: Words, read: Words) -> None:
    """Behind those that are there, beginning where the one is whose turn it was last."""
    address = read.ctypes.data
    read[at.READ_NEXT] = 0
    read[at.READ_TAG] = board[at.BOARD_CLOCK]
    read[at.READ_IS_IN_ORDER] = 1
    if board[at.BOARD_FIRST] == 0:
        board[at.BOARD_FIRST] = address
    else:
        at.words_at(board[at.BOARD_LAST], at.READ_UNREAD)[at.READ_NEXT] = address
    board[at.BOARD_LAST] = address


@compiled(types.void(LONGS, LONGS))
def leave(board: Words, read: Words) -> None:
    """Nothing if it is not there."""
    if read[at.READ_IS_IN_ORDER] == 0:
        return
    read[at.READ_IS_IN_ORDER] = 0
    before, address = 0, board[at.BOARD_FIRST]
    while address != read.ctypes.data:
        before, address = address, at.words_at(address, at.READ_UNREAD)[at.READ_NEXT]
    if before == 0:
        board[at.BOARD_FIRST] = read[at.READ_NEXT]
    else:
        at.words_at(before, at.READ_UNREAD)[at.READ_NEXT] = read[at.READ_NEXT]
    if board[at.BOARD_LAST] == address:
        board[at.BOARD_LAST] = before


@compiled(INT(LONGS))
def whose_turn(board: Words) -> int:
    """The read with the lowest tag, of those the one that came first; 0 if there is none."""
    found, lowest, address = 0, 0, board[at.BOARD_FIRST]
    while address != 0:
        read = at.words_at(address, at.READ_UNREAD)
        if found == 0 or read[at.READ_TAG] < lowest:
            found, lowest = address, read[at.READ_TAG]
        address = read[at.READ_NEXT]
    return found


@compiled(types.void(LONGS, LONGS, INT))
def charge(board: Words, read: Words, share: int) -> None:
    """The read whose turn it was begins a part of a layer that has ``share`` parts."""
    board[at.BOARD_CLOCK] = max(board[at.BOARD_CLOCK], read[at.READ_TAG])
    read[at.READ_TAG] += read[at.READ_STRIDE] * (at.LAYER_CHARGE // share)


@compiled(types.void(LONGS, LONGS, INT))
def speed_up(board: Words, read: Words, stride: int) -> None:
    """Give a read another stride, and its next turn as if it came now, unless that is later."""
    read[at.READ_STRIDE] = stride
    read[at.READ_TAG] = min(read[at.READ_TAG], board[at.BOARD_CLOCK])
