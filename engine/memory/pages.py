"""Page numbers: which are free and which are taken. Pure integers; the memory itself is in ``pool``."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """Fewer pages are free than were asked for. Nothing was taken."""


class PageAllocator:
    """Hands out page ids 0 to ``pages - 1``. The page freed last is taken first: its memory is likely still cached."""

    def __init__(self, pages: int) -> None:
        if pages <= 0:
            raise ValueError(f"pages: must be greater than 0, is {pages}")
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._taken = bytearray(pages)

    @property
    def free_pages(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` pages, all or none. Raises OutOfPagesError, and ValueError for a negative count."""
        if count < 0:
            raise ValueError(f"count: must not be negative, is {count}")
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages asked for, {len(self._free)} of {self.pages} are free")
        taken = tuple(self._free.pop() for _ in range(count))
        for page in taken:
            self._taken[page] = 1
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises ValueError, changing nothing, if one is free already, named twice or unknown."""
        returned = tuple(pages)
        for page in returned:
            if not 0 <= page < self.pages:
                raise ValueError(f"page {page} does not exist, there are {self.pages}")
            if not self._taken[page]:
                raise ValueError(f"page {page} is free already")
        if len(set(returned)) != len(returned):
            raise ValueError(f"a page is named twice in {returned}")
        for page in returned:
            self._taken[page] = 0
        self._free.extend(reversed(returned))

    def is_free(self, page: int) -> bool:
        """Whether ``page`` is free. Raises IndexError for an unknown page."""
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} does not exist, there are {self.pages}")
        return not self._taken[page]

    def check(self) -> None:
        """Raise AssertionError unless every page is either free, once, or taken."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        for page in range(self.pages):
            assert (page in free) != bool(self._taken[page]), f"page {page} is both or neither free and taken"
        assert free <= set(range(self.pages)), "the free list names an unknown page"
