"""Where a text that comes in pieces ends, against the plain definition on the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.server.stop_strings import StopMatcher

# Few characters, so that stop strings overlap themselves and each other; one has four bytes in UTF-8.
ALPHABET = "ab😀"
TEXTS = st.text(alphabet=ALPHABET, min_size=1, max_size=24)


def cut(text: str, stops: list[str], exempt: int = 0) -> str:
    """The text before the first stop string that ends behind the first ``exempt`` characters."""
    begins = (
        start
        for start in range(len(text))
        for stop in stops
        if text.startswith(stop, start) and start + len(stop) > exempt
    )
    return text[: min(begins, default=len(text))]


def pieces_of(text: str, draw: st.DrawFn, *places: int) -> list[str]:
    """The text in pieces; it is cut at ``places`` in any case."""
    cuts = {*draw(st.lists(st.integers(0, len(text)))), *places, 0, len(text)}
    return [text[start:end] for start, end in pairwise(sorted(cuts))]


@dataclass(frozen=True)
class Case:
    """A text in pieces, of which some come before all that counts."""

    stops: list[str]
    pieces: list[str]
    exempt: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    text = draw(TEXTS)
    exempt = draw(st.just(0) | st.integers(0, len(text)))
    # What is in the text, and what only begins there.
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6))
    inside = places.map(lambda place: text[place[0] : sum(place)])
    beginning = st.tuples(inside, st.sampled_from(ALPHABET)).map("".join)
    stops = draw(st.lists(inside | beginning | st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4))
    return Case(stops, pieces_of(text, draw, exempt), exempt)


@settings(max_examples=500)
@given(cases())
def test_any_pieces_give_what_the_whole_text_gives(case: Case) -> None:
    text = "".join(case.pieces)
    whole = cut(text, case.stops, case.exempt)
    matcher = StopMatcher(case.stops)
    released, seen = "", 0
    for piece in case.pieces:
        seen += len(piece)
        released += matcher.push(piece, exempt=seen <= case.exempt)
        assert whole.startswith(released)
        assert not matcher.stopped or released == whole
    released += matcher.flush()
    assert released == whole
    assert matcher.stopped == (whole != text)
    assert matcher.push("more") == ("" if matcher.stopped else "more")


@settings(max_examples=500)
@given(cases())
def test_no_more_is_held_back_than_may_be_a_stop_string(case: Case) -> None:
    matcher = StopMatcher(case.stops)
    released, text = "", ""
    for piece in case.pieces:
        text += piece
        released += matcher.push(piece)
        if matcher.stopped:
            return
        held = text[len(released) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in case.stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (["END"], ["a E", "ND b"], ["a ", ""]),
        (["END"], ["a E", "N", "x"], ["a ", "", "ENx"]),
        (["."], ["Yes. No."], ["Yes"]),
        (["你好"], ["a你", "你", "好"], ["a", "你", ""]),
        (["abcd", "bc"], ["abc", "d"], ["", ""]),
        (["abcd", "bc"], ["abc", "x"], ["", "a"]),
        (["ab", "abc"], ["ab"], [""]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
    ],
)
def test_what_each_piece_releases(stops: list[str], pieces: list[str], released: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(piece) for piece in pieces] == released


def test_what_was_held_back_comes_at_the_end() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("xab") == "x"
    assert matcher.flush() == "ab"
    assert not matcher.stopped
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("xabc") == "x"
    assert matcher.flush() == "a"
    assert matcher.stopped


def test_a_stop_string_counts_if_it_ends_behind_the_exempt_text() -> None:
    matcher = StopMatcher(["--"])
    assert matcher.push("a--b-", exempt=True) == "a--b"
    assert matcher.push("-c") == ""
    assert matcher.stopped
