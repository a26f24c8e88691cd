"""Python's regular expressions, as far as they are read here: every construct as in ``re``, or refused by name.

Read are characters, ``.``, classes, groups (plain, ``?:``, named), ``|``, the repeats ``* + ? {m,n}``, greedy or lazy,
``^ $ \\A \\Z \\b \\B``, ``\\d \\w \\s`` and their opposites, look-ahead, and look-behind of fixed width. Refused is
what sets of positions cannot answer (backreferences, conditions, atomic groups, possessive repeats), what nobody writes
to name modules (flags, escapes of other letters, characters beyond ASCII), and a repeat of what may be empty, whose
meaning differs between engines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

MAX_PATTERN_CHARS = 16_384
MAX_GROUP_DEPTH = 20

_ASCII = tuple(map(chr, range(128)))
_COUNTS = re.compile(r"\{(?:(\d{1,4})|(\d{0,4}),(\d{0,4}))\}")
_GROUP_NAME = re.compile(r"\(\?P<([A-Za-z_][A-Za-z0-9_]*)>")
_KINDS = frozenset("dDwWsS")
_ANCHORS = {"^": "start", "$": "end", "\\A": "start", "\\Z": "end", "\\b": "boundary", "\\B": "inside"}
# Python warns that it may give these another meaning within a class.
_RESERVED_IN_CLASS = ("--", "&&", "~~", "||")


class PatternError(ValueError):
    """A pattern that is malformed or not served. The message says why."""


class PatternWork:
    """The work that the patterns of one adapter may cause, in steps of about half a microsecond."""

    def __init__(self, steps: int) -> None:
        self._steps_left = steps

    def spend(self, steps: int) -> None:
        """Raises PatternError when there are none left."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise PatternError("matching it takes too many steps")


@dataclass(frozen=True, eq=False)
class Text:
    """These characters, one after the other."""

    text: str

    @property
    def width(self) -> tuple[int, int | None]:
        return len(self.text), len(self.text)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Any one of these characters."""

    characters: frozenset[str]
    width: tuple[int, int | None] = (1, 1)


@dataclass(frozen=True, eq=False)
class Anchor:
    """A place: ``start``, ``end``, a word's ``boundary``, or the ``inside`` of a word or of what is between words."""

    kind: str
    width: tuple[int, int | None] = (0, 0)


@dataclass(frozen=True, eq=False)
class Sequence:
    """The items, one after the other."""

    items: tuple[Node, ...]

    @cached_property
    def width(self) -> tuple[int, int | None]:
        low, high = 0, 0
        unbounded = False
        for item_low, item_high in (item.width for item in self.items):
            low += item_low
            high += item_high or 0
            unbounded = unbounded or item_high is None
        return low, None if unbounded else high


@dataclass(frozen=True, eq=False)
class Choice:
    """Any one of the branches."""

    branches: tuple[Node, ...]

    @cached_property
    def width(self) -> tuple[int, int | None]:
        highs = [branch.width[1] for branch in self.branches]
        bounded = [high for high in highs if high is not None]
        return min(branch.width[0] for branch in self.branches), None if len(bounded) < len(highs) else max(bounded)


@dataclass(frozen=True, eq=False)
class Repeat:
    """``low`` to ``high`` (None: any number) times the body."""

    body: Node
    low: int
    high: int | None

    @cached_property
    def width(self) -> tuple[int, int | None]:
        body_low, body_high = self.body.width
        unbounded = self.high is None or body_high is None
        return self.low * body_low, None if unbounded else (self.high or 0) * (body_high or 0)


@dataclass(frozen=True, eq=False)
class Look:
    """Holds where the body matches, or for a ``negative`` one does not: ahead, or ``behind`` characters before."""

    body: Node
    negative: bool
    behind: int | None
    width: tuple[int, int | None] = (0, 0)


Node = Text | OneOf | Anchor | Sequence | Choice | Repeat | Look


def parse_pattern(pattern: str, work: PatternWork) -> Node:
    """The pattern's tree, in time proportional to its length. Raises PatternError."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise PatternError(f"it is longer than {MAX_PATTERN_CHARS} characters")
    if not pattern.isascii():
        raise PatternError("it has characters beyond ASCII")
    work.spend(len(pattern))
    return _Parser(pattern, work).parse()


class _Parser:
    """Recursive descent; ``_at`` is the index of the next character."""

    def __init__(self, pattern: str, work: PatternWork) -> None:
        self._pattern = pattern
        self._work = work
        self._known: dict[str, OneOf] = {}
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()

    def parse(self) -> Node:
        node = self._choice()
        if self._at < len(self._pattern):
            raise PatternError("it has an unbalanced ')'")
        return node

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > MAX_GROUP_DEPTH:
            raise PatternError(f"its groups are nested deeper than {MAX_GROUP_DEPTH}")
        branches = [self._sequence()]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            branches.append(self._sequence())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            item = self._repeated(self._item())
            last = items[-1] if items else None
            if isinstance(item, Text) and isinstance(last, Text):
                items[-1] = Text(last.text + item.text)
            else:
                items.append(item)
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _item(self) -> Node:
        character = self._pattern[self._at]
        if character == "(":
            return self._group()
        if character == "[":
            return self._one_of(self._class_text())
        if character in "*+?":
            raise PatternError(f"{character!r} has nothing to repeat")
        if character == "{":
            raise PatternError("a '{' that is meant as a character needs a backslash")
        if character == "\\":
            return self._escape()
        self._at += 1
        if character in "^$":
            return Anchor(_ANCHORS[character])
        return self._one_of(".") if character == "." else Text(character)

    def _escape(self) -> Node:
        escape = self._pattern[self._at : self._at + 2]
        self._at += 2
        if escape in _ANCHORS:
            return Anchor(_ANCHORS[escape])
        if len(escape) == 2 and escape[1] in _KINDS:
            return self._one_of(escape)
        if len(escape) < 2 or escape[1].isalnum():
            raise PatternError(f"{escape} is not supported")
        return Text(escape[1])

    def _class_text(self) -> str:
        """The class at this place as it is written; what it means is left to ``re``."""
        start = self._at
        self._at += 2 if self._pattern.startswith("[^", start) else 1
        first = self._at
        while self._at == first or not self._pattern.startswith("]", self._at):
            character = self._pattern[self._at : self._at + 1]
            following = self._pattern[self._at + 1 : self._at + 2]
            if not character or (character == "\\" and not following):
                raise PatternError("it has an unterminated '['")
            if character == "[" or character + following in _RESERVED_IN_CLASS:
                raise PatternError(f"{character + following!r} within a class is not supported: use backslashes")
            if character == "\\" and following.isalnum() and following not in _KINDS:
                raise PatternError(f"\\{following} within a class is not supported")
            self._at += 2 if character == "\\" else 1
        self._at += 1
        return self._pattern[start : self._at]

    def _group(self) -> Node:
        start = self._at
        look = next((kind for kind in ("(?=", "(?!", "(?<=", "(?<!") if self._pattern.startswith(kind, start)), None)
        named = _GROUP_NAME.match(self._pattern, start)
        if look is not None:
            self._at += len(look)
        elif named is not None:
            if named[1] in self._names:
                raise PatternError(f"the group name {named[1]!r} is defined twice")
            self._names.add(named[1])
            self._at = named.end()
        elif self._pattern.startswith("(?:", start):
            self._at += 3
        elif self._pattern.startswith("(?", start):
            raise PatternError(f"{self._pattern[start : start + 4]} is not supported")
        else:
            self._at += 1
        body = self._choice()
        if not self._pattern.startswith(")", self._at):
            raise PatternError("it has an unterminated '('")
        self._at += 1
        return body if look is None else _look(look, body)

    def _repeated(self, item: Node) -> Node:
        sign = self._pattern[self._at : self._at + 1]
        if not sign or sign not in "*+?{":
            return item
        if sign == "{":
            counts = _COUNTS.match(self._pattern, self._at)
            if counts is None:
                raise PatternError("a '{' must begin a count of at most 4 digits or have a backslash")
            exact, least, most = counts.groups()
            low = int(exact or least or 0)
            high = low if exact else int(most) if most else None
            self._at = counts.end()
        else:
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            self._at += 1
        if isinstance(item, Anchor):
            raise PatternError(f"{sign!r} has nothing to repeat")
        if high is not None and high < low:
            raise PatternError("a repeat's least count is greater than its greatest")
        if high != 0 and high != 1 and item.width[0] == 0:
            raise PatternError("a repeat of what may be empty is not supported")
        if self._pattern.startswith("?", self._at):
            self._at += 1
        following = self._pattern[self._at : self._at + 1]
        if following == "+":
            raise PatternError("possessive repeats are not supported")
        if following and following in "*?{":
            raise PatternError(f"{following!r} repeats a repeat")
        return Repeat(item, low, high)

    def _one_of(self, expression: str) -> OneOf:
        """An expression for one character, with those of ASCII that ``re`` says it matches."""
        known = self._known.get(expression)
        if known is None:
            self._work.spend(len(expression) + len(_ASCII))
            try:
                compiled = re.compile(expression)
            except re.error as error:
                raise PatternError(f"{expression} is malformed: {error.msg}") from None
            known = OneOf(frozenset(character for character in _ASCII if compiled.fullmatch(character)))
            self._known[expression] = known
        return known


def _look(kind: str, body: Node) -> Node:
    if "<" not in kind:
        return Look(body, negative="!" in kind, behind=None)
    low, high = body.width
    if low != high:
        raise PatternError("look-behind must have a fixed width")
    return Look(body, negative="!" in kind, behind=low)
