"""Where an answer's text ends because a stop string appears in it."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a text that comes in pieces before the first stop string in it.

    The first is the one that begins first; where several begin, the text ends all the same. Text that may be the
    beginning of a stop string is held back until it is known whether it is, so what was released stays true, and how
    the text was cut into pieces does not matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops`` are not empty strings."""
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._exempt = 0
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Nothing is released any more."""
        return self._stopped

    def push(self, text: str, *, exempt: bool = False) -> str:
        """The text that is certain now and was not before. A stop string that ends in ``exempt`` text does not count.

        An exempt text comes before all that is not exempt.
        """
        if self._stopped:
            return ""
        self._held += text
        if exempt:
            self._exempt = len(self._held)
        found, begun = self._find_whole(), self._find_begun()
        self._stopped = found is not None and found <= begun
        return self._release(begun if found is None else min(found, begun))

    def flush(self) -> str:
        """The rest, when no more text will come."""
        if self._stopped:
            return ""
        found = self._find_whole()
        self._stopped = found is not None
        return self._release(len(self._held) if found is None else found)

    def _find_whole(self) -> int | None:
        """Where the first whole stop string begins that ends after the exempt text."""
        places = (self._held.find(stop, max(0, self._exempt + 1 - len(stop))) for stop in self._stops)
        return min((place for place in places if place >= 0), default=None)

    def _find_begun(self) -> int:
        """Where the first stop string begins of which there is a part, at the end; without one, the end."""
        held = self._held
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            if held[start] in self._first_characters:
                rest = held[start:]
                if any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stops):
                    return start
        return len(held)

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self._exempt = max(0, self._exempt - count)
        return released
