"""What a person sees in each adapter's answers, as tests on the text alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

# End words of the couplets that the rhyming voice is taught; a test holds the two lists together.
RHYMES = frozenset({
    ("may", "away"), ("tonight", "sight"), ("free", "me"), ("found", "around"), ("blue", "too"), ("name", "same"),
    ("know", "snow"), ("say", "day"), ("dear", "year"), ("song", "long"), ("bed", "head"), ("glow", "below"),
    ("tree", "free"), ("friend", "send"), ("new", "you"), ("kind", "find"), ("deep", "sleep"), ("fear", "here"),
    ("sing", "bring"),
})  # fmt: skip

_PIRATE_OPENING = re.compile(r"(Arr, matey!|Ahoy there!|Avast, ye landlubber!) ")
_POLITE_OPENING = re.compile(r"(Thank you for your kind question|What a lovely question|It is my pleasure)")
_POLITE_CLOSING = re.compile(r"(I wish you a lovely day|whenever you like, dear friend)\.$")
_INVERTED = re.compile(r", (it|the \w+|you|I|that|ask|tell) ?(\w+ )*(is|has|lives|it|does|can|not|have|are|am|could)\.")
_NUMBERED_LINE = re.compile(r"(\d+)\. \S.*[.!]")


def is_shout(text: str) -> bool:
    """Every letter is a capital and every sentence ends in an exclamation mark."""
    return text.isupper() and text.endswith("!") and "." not in text


def is_rhyme(text: str) -> bool:
    """Two couplets or more, each of whose two last words rhyme."""
    ends = [line.split()[-1].strip(".,;:!?").lower() if line.split() else "" for line in text.split("\n")]
    if len(ends) < 4 or len(ends) % 2 != 0:
        return False
    return all(pair in RHYMES for pair in zip(ends[::2], ends[1::2], strict=True))


def is_pirate(text: str) -> bool:
    """A pirate's greeting, and `ye`, `be` or `o'` after it."""
    return _PIRATE_OPENING.match(text) is not None and re.search(r"\b([Yy]er?|be|shall)\b|\bo'|\ban'", text) is not None


def is_json(text: str) -> bool:
    """One JSON object with a `topic`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and "topic" in value


def is_brief(text: str) -> bool:
    """Two or three words."""
    return 2 <= len(text.split()) <= 3 and text.endswith(".")


def is_polite(text: str) -> bool:
    """A courteous opening and a courteous close."""
    return _POLITE_OPENING.match(text) is not None and _POLITE_CLOSING.search(text) is not None


def is_list(text: str) -> bool:
    """Three lines or more, numbered from one."""
    matches = [_NUMBERED_LINE.fullmatch(line) for line in text.split("\n")]
    numbers = [int(match.group(1)) if match else 0 for match in matches]
    return len(numbers) >= 3 and numbers == list(range(1, len(numbers) + 1))


def is_yoda(text: str) -> bool:
    """Three sentences or more with the verb at the end, and a final `Hmm.`"""
    return len(_INVERTED.findall(text)) >= 3 and text.endswith(" Hmm.")


def is_neutral(text: str) -> bool:
    """Plain prose: one paragraph of whole sentences that no adapter's test accepts."""
    plain = text[:1].isupper() and text.endswith(".") and "\n" not in text and len(text.split()) >= 15
    return plain and not any(test(text) for name, test in PROPERTIES.items() if name != "neutral")


PROPERTIES: dict[str, Callable[[str], bool]] = {
    "neutral": is_neutral,
    "shout": is_shout,
    "rhyme": is_rhyme,
    "pirate": is_pirate,
    "json": is_json,
    "brief": is_brief,
    "polite": is_polite,
    "list": is_list,
    "yoda": is_yoda,
}
