"""Matching module paths against regular expressions of untrusted files, in bounded work.

``re`` backtracks: ``(a+)+$`` takes time exponential in the path's length and cannot be interrupted. The ``regex``
package has a timeout for matching but none for compiling, where a few nested counts take all memory, and it reads some
patterns otherwise than ``re``. So what ``pattern_syntax`` reads is answered here by sets of positions, as by a
nondeterministic automaton (Thompson 1968, doi 10.1145/363347.363387): each part of a pattern is tried at most once at
each place of a path, and whether there is a match depends on neither greed nor groups. The work is counted, not timed,
so that an adapter is served on every machine or on none. All of it is Python, so that other threads go on meanwhile.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator

from segue.engine.lora.pattern_syntax import (
    Anchor,
    Choice,
    Look,
    Node,
    OneOf,
    PatternWork,
    Repeat,
    Sequence,
    Text,
    parse_pattern,
)

_WORD = frozenset(string.ascii_letters + string.digits + "_")


class PathPattern:
    """A regular expression for paths: ASCII, not empty and of one line."""

    def __init__(self, pattern: str, work: PatternWork) -> None:
        """``work`` is what this and all its matches may use. Raises PatternError."""
        self._root = parse_pattern(pattern, work)
        self._work = work

    def fullmatch(self, path: str) -> bool:
        """Whether re.fullmatch finds a match. Raises PatternError when it takes too much work."""
        return self.reaches_end(path, (0,))

    def reaches_end(self, path: str, starts: Iterable[int]) -> bool:
        """Whether a match from one of the places in the path ends with it. Raises as ``fullmatch``."""
        search = _Search(path, self._work)
        return any(search.ends(self._root, start) >> len(path) for start in starts)

    def match(self, path: str) -> bool:
        """Whether re.match finds a match. Raises as ``fullmatch``."""
        return _Search(path, self._work).ends(self._root, 0) != 0


class _Search:
    """One path. Sets of positions are integers: bit i stands for the place before character i."""

    def __init__(self, path: str, work: PatternWork) -> None:
        self._path = path
        self._work = work
        self._known: dict[tuple[Node, int], int] = {}
        self._members: dict[OneOf, int] = {}

    def ends(self, node: Node, start: int) -> int:
        """Where matches of ``node`` that begin at ``start`` may end."""
        self._work.spend(1)
        if isinstance(node, (Text, OneOf, Anchor)):
            return self._find_ends(node, start)
        known = self._known.get((node, start))
        if known is None:
            known = self._known[node, start] = self._find_ends(node, start)
        return known

    def _find_ends(self, node: Node, start: int) -> int:
        match node:
            case Text():
                return self._path.startswith(node.text, start) << (start + len(node.text))
            case OneOf():
                return (self._places_of(node) >> start & 1) << (start + 1)
            case Anchor():
                return self._holds(node.kind, start) << start
            case Sequence():
                reached = 1 << start
                for item in node.items:
                    reached = self._union(item, reached)
                    if not reached:
                        break
                return reached
            case Choice():
                self._work.spend(len(node.branches))
                return _join(self.ends(branch, start) for branch in node.branches)
            case Repeat():
                return self._repeat(node, start)
            case Look():
                return self._look(node, start) << start

    def _union(self, node: Node, starts: int) -> int:
        self._work.spend(starts.bit_count())
        return _join(self.ends(node, start) for start in _positions(starts))

    def _repeat(self, node: Repeat, start: int) -> int:
        if isinstance(node.body, OneOf):
            return self._run(node.body, start, node.low, node.high)
        reached = 1 << start if node.low == 0 else 0
        current, count = 1 << start, 0
        while current and count != node.high:
            current = self._union(node.body, current)
            count += 1
            if count >= node.low:
                # A place reached earlier has had at least as many repeats left.
                current &= ~reached
                reached |= current
        return reached

    def _run(self, body: OneOf, start: int, low: int, high: int | None) -> int:
        places = self._places_of(body) >> start
        longest = (~places & (places + 1)).bit_length() - 1
        longest = longest if high is None else min(longest, high)
        return 0 if longest < low else ((1 << (longest - low + 1)) - 1) << (start + low)

    def _look(self, node: Look, start: int) -> bool:
        if node.behind is None:
            found = self.ends(node.body, start) != 0
        else:
            begin = start - node.behind
            found = begin >= 0 and bool(self.ends(node.body, begin) >> start & 1)
        return found is not node.negative

    def _places_of(self, node: OneOf) -> int:
        """The places before the characters of the path that are members."""
        places = self._members.get(node)
        if places is None:
            self._work.spend(len(self._path))
            places = _join(1 << index for index, character in enumerate(self._path) if character in node.characters)
            self._members[node] = places
        return places

    def _holds(self, kind: str, at: int) -> bool:
        if kind == "start":
            return at == 0
        if kind == "end":
            return at == len(self._path)
        before = at > 0 and self._path[at - 1] in _WORD
        after = at < len(self._path) and self._path[at] in _WORD
        return (before is not after) is (kind == "boundary")


def _positions(places: int) -> Iterator[int]:
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest


def _join(sets: Iterable[int]) -> int:
    joined = 0
    for places in sets:
        joined |= places
    return joined
