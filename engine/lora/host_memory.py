"""Byte extents of the host adapter store: first fit with coalescing. Pure integers; the bytes are in shared memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

ALIGNMENT_BYTES = 64


class HostExtents:
    """Hands out extents of ``capacity_bytes`` bytes, each starting at a multiple of 64 and rounded up to 64 bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        """Raises ValueError when not a single aligned extent would fit."""
        usable = capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if usable <= 0:
            raise ValueError(f"capacity_bytes: must be at least {ALIGNMENT_BYTES}, is {capacity_bytes}")
        self.capacity_bytes = usable
        self._starts = [0]
        self._sizes = [usable]
        self._taken: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent; they need not be contiguous."""
        return sum(self._sizes)

    @property
    def taken(self) -> dict[int, int]:
        """Offset to size of every extent handed out."""
        return dict(self._taken)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a new extent in the first gap that is large enough, or None. Raises ValueError for size < 1."""
        size = _aligned(size_bytes)
        for index, available in enumerate(self._sizes):
            if available >= size:
                return self._carve(index, size)
        return None

    def free(self, offset: int) -> None:
        """Give the extent at ``offset`` back. Raises ValueError if none starts there."""
        if offset not in self._taken:
            raise ValueError(f"no extent starts at {offset}")
        size = self._taken.pop(offset)
        index = bisect_left(self._starts, offset)
        if index < len(self._starts) and offset + size == self._starts[index]:
            size += self._sizes[index]
            del self._starts[index], self._sizes[index]
        if index > 0 and self._starts[index - 1] + self._sizes[index - 1] == offset:
            self._sizes[index - 1] += size
        else:
            self._starts.insert(index, offset)
            self._sizes.insert(index, size)

    def fits_without(self, size_bytes: int, offsets: Iterable[int]) -> bool:
        """Whether an extent of ``size_bytes`` would fit once the extents at ``offsets`` were given back."""
        size = _aligned(size_bytes)
        gaps = sorted([*zip(self._starts, self._sizes, strict=True), *((at, self._taken[at]) for at in set(offsets))])
        end = run = 0
        for start, length in gaps:
            run = run + length if start == end else length
            end = start + length
            if run >= size:
                return True
        return False

    def check(self) -> None:
        """Raise AssertionError unless gaps and extents tile the store, and no two gaps touch."""
        gaps = list(zip(self._starts, self._sizes, strict=True))
        end = 0
        for start, size in sorted([*gaps, *self._taken.items()]):
            assert size > 0, f"the piece at {start} is empty"
            assert start == end, f"the pieces before and at {start} overlap or leave a hole: {end}"
            assert start % ALIGNMENT_BYTES == 0, f"the piece at {start} is not aligned"
            end = start + size
        assert end == self.capacity_bytes, f"the pieces end at {end}, the store at {self.capacity_bytes}"
        for (start, size), (following, _) in pairwise(gaps):
            assert start + size < following, f"the gaps at {start} and {following} should be one"

    def _carve(self, index: int, size: int) -> int:
        offset = self._starts[index]
        if self._sizes[index] == size:
            del self._starts[index], self._sizes[index]
        else:
            self._starts[index] += size
            self._sizes[index] -= size
        self._taken[offset] = size
        return offset


def _aligned(size_bytes: int) -> int:
    if size_bytes <= 0:
        raise ValueError(f"size_bytes: must be greater than 0, is {size_bytes}")
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
