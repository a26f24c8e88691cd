"""Reading runs of a file into memory and looking whether their values are finite, in one call without the GIL.

The engine's loop thread launches kernels while weights are read. A thread that asks for the GIL between two reads waits
for it, and has the loop wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segue.compiled import HALVES, INT, LONGS, WORDS, compiled, types

RUN_LONGS = 3
"""A run: its offset in the file, where its bytes go, and how many they are."""

PIECE_BYTES = 512 << 10
"""What was read is looked at while it is in the L2 cache."""

# By glibc and musl for 64-bit machines: ssize_t pread(int, void *, size_t, off_t).
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatBits:
    """A floating-point format: what is not finite has a magnitude, without the sign, from ``first_not_finite`` on."""

    item_bytes: int
    first_not_finite: int


FLOAT_BITS = {
    torch.float32: FloatBits(item_bytes=4, first_not_finite=0x7F80_0000),
    torch.bfloat16: FloatBits(item_bytes=2, first_not_finite=0x7F80),
    torch.float16: FloatBits(item_bytes=2, first_not_finite=0x7C00),
}
# Of values that are looked at later, in another format.
_UNCHECKED = FloatBits(item_bytes=0, first_not_finite=0)


class Target:
    """Memory that runs are read into: ``octets`` uint8 [bytes], a multiple of 4 of them. Runs begin at whole elements.

    ``dtype`` is that of the elements; None for those that are not looked at. ``halves`` and ``words`` are
    the same bytes.
    """

    def __init__(self, octets: npt.NDArray[np.uint8], dtype: torch.dtype | None) -> None:
        self.octets = octets
        self.bits = _UNCHECKED if dtype is None else FLOAT_BITS[dtype]
        self.halves = octets[: octets.size & ~3].view(np.uint16)
        self.words = self.halves.view(np.uint32)

    @classmethod
    def of(cls, memory: Tensor, dtype: torch.dtype | None) -> Target:
        """``memory`` is uint8 [bytes] on the host."""
        return cls(memory.numpy(), dtype)

    def read(self, descriptor: int, runs: npt.NDArray[np.int64], offset: int) -> int:
        """Read the runs, whose places count from ``offset``, as far as each read brings all that it asks for and all
        is finite; how many bytes that are, in the order of the runs."""
        bits = self.bits
        read: int = read_into(
            descriptor, runs, offset, self.halves, self.words, bits.item_bytes, bits.first_not_finite, PIECE_BYTES
        )
        return read

    def not_finite(self, start: int, size_bytes: int) -> int | None:
        """Where in these bytes the first element begins that is not finite, counted from the target's beginning."""
        item_bytes = self.bits.item_bytes
        if item_bytes == 2:
            index = _first_half(self.halves, start // 2, size_bytes // 2, self.bits.first_not_finite)
        elif item_bytes == 4:
            index = _first_word(self.words, start // 4, size_bytes // 4, self.bits.first_not_finite)
        else:
            return None
        return None if index < 0 else start + index * item_bytes


ReadRuns = Callable[[Target, int, npt.NDArray[np.int64], int], int]
"""``Target.read``: (target, descriptor, runs int64 [n * RUN_LONGS], offset) -> bytes."""


@compiled(types.boolean(HALVES, INT, INT, types.uint16))
def _are_halves_finite(halves: npt.NDArray[np.uint16], start: int, count: int, first_not_finite: int) -> bool:
    largest = np.uint16(0)
    part = halves[start : start + count]
    for index in range(len(part)):
        largest = max(largest, part[index] & np.uint16(0x7FFF))
    return bool(largest < first_not_finite)


@compiled(types.boolean(WORDS, INT, INT, types.uint32))
def _are_words_finite(words: npt.NDArray[np.uint32], start: int, count: int, first_not_finite: int) -> bool:
    largest = np.uint32(0)
    part = words[start : start + count]
    for index in range(len(part)):
        largest = max(largest, part[index] & np.uint32(0x7FFF_FFFF))
    return bool(largest < first_not_finite)


@compiled(INT(HALVES, INT, INT, types.uint16))
def _first_half(halves: npt.NDArray[np.uint16], start: int, count: int, first_not_finite: int) -> int:
    if not _are_halves_finite(halves, start, count, first_not_finite):
        for index in range(count):
            if halves[start + index] & np.uint16(0x7FFF) >= first_not_finite:
                return index
    return -1


@compiled(INT(WORDS, INT, INT, types.uint32))
def _first_word(words: npt.NDArray[np.uint32], start: int, count: int, first_not_finite: int) -> int:
    if not _are_words_finite(words, start, count, first_not_finite):
        for index in range(count):
            if words[start + index] & np.uint32(0x7FFF_FFFF) >= first_not_finite:
                return index
    return -1


@compiled(INT(INT, LONGS, INT, HALVES, WORDS, INT, INT, INT))
def read_into(
    descriptor: int,
    runs: npt.NDArray[np.int64],
    offset: int,
    halves: npt.NDArray[np.uint16],
    words: npt.NDArray[np.uint32],
    item_bytes: int,
    first_not_finite: int,
    piece_bytes: int,
) -> int:
    """See ``Target.read``, whose bits are ``item_bytes`` and ``first_not_finite``."""
    address = halves.ctypes.data
    total = 0
    for run in range(0, len(runs), 3):
        done = 0
        while done < runs[run + 2]:
            start = offset + runs[run + 1] + done
            size = min(piece_bytes, runs[run + 2] - done)
            if _pread(descriptor, address + start, size, runs[run] + done) != size:
                return total
            if item_bytes == 2 and not _are_halves_finite(halves, start // 2, size // 2, first_not_finite):
                return total
            if item_bytes == 4 and not _are_words_finite(words, start // 4, size // 4, first_not_finite):
                return total
            done += size
            total += size
    return total
