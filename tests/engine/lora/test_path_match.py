"""Expressions in a process of their own: what ``re`` says, or an error that names the option, and never without end."""

from __future__ import annotations

import re
import threading
import time

import psutil
import pytest

from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import module_path
from segue.engine.lora.path_match import MAX_PATTERN_CHARS, Expression, match_paths
from segue.errors import AdapterRejectedError

PATHS = [module_path(layer, projection) for layer in range(4) for projection in Projection]
PATTERNS = [
    r".*\.[02]\.self_attn\.(q|v)_proj",
    r"model\.layers\.(?P<idx>\d+)\.mlp",
    r"(?P<idx>nothing)?model",
    r".*(?<!layers\.0\.mlp)\.[a-z]{2,4}_proj",
    r"^(?!.*mlp).*(?:q_proj|up_proj).*",
    r"(?i)MODEL.*Q_PROJ",
    r".*(?P<twice>l).*(?P=twice).*_proj",
    r"(model)?(?(1)\.layers|x)\.1.*",
    r"(?>model)\.[a-z]++\.2.*",
    r"(a*)*model.*|",
    r"\x6dodel.*",
    r"[]]|m",
    "",
    "ä",
]
ENDLESS = [
    "(.*)*.*(x+x+)+y",
    "(([a-z_.0-9]+)+)+X",
    "(?:(?:(?:.{1,100}){1,100}){1,100}){1,100}X",
    "(?:.??){4000000000}x",
]
INVALID = [
    ("(a", "unterminated subpattern"),
    ("[a", "unterminated character set"),
    ("*a", "nothing to repeat"),
    ("a{99999999999999}", "repetition number is too large"),
    ("a{" + "9" * 5000 + "}", "4300 digits"),
    ("(?a)(?u)x", "flags are incompatible"),
    ("(" * 2000 + ")" * 2000, "nested too deeply"),
    ("\ud800(", "unterminated"),
]


def expression(pattern: str, option: str = "target_modules", *, whole: bool = True) -> Expression:
    return Expression(option=option, pattern=pattern, regex=pattern, whole=whole)


@pytest.mark.parametrize("whole", [True, False])
def test_paths_are_matched_as_by_re(whole: bool) -> None:
    asked = [expression(pattern, f"option {number}", whole=whole) for number, pattern in enumerate(PATTERNS)]
    found = match_paths(asked, PATHS)
    for item in asked:
        matches = {path: (re.fullmatch if whole else re.match)(item.regex, path) for path in PATHS}
        assert found[item] == {path: match.groupdict().get("idx") for path, match in matches.items() if match}
    assert sum(map(len, found.values())) > len(PATHS)


def test_a_path_counts_for_the_first_expression_of_its_option() -> None:
    first, same, rest, other = (
        expression(".*q_proj"),
        expression(".*q_proj"),
        expression(".*[qk]_proj"),
        expression(".*q_proj", "exclude_modules"),
    )
    found = match_paths([first, same, other, rest], PATHS)
    q_paths = {path: None for path in PATHS if path.endswith("q_proj")}
    assert found[first] == found[other] == q_paths
    assert found[same] == {}
    assert found[rest] == {path: None for path in PATHS if path.endswith("k_proj")}


@pytest.mark.parametrize("pattern", ENDLESS)
def test_an_expression_beyond_the_bounds_is_refused_by_name(pattern: str) -> None:
    asked = [expression(".*"), expression(pattern, "exclude_modules"), expression("x")]
    with pytest.raises(AdapterRejectedError) as refusal:
        match_paths(asked, PATHS)
    assert f"exclude_modules: the pattern {pattern!r} takes too much time or memory" in str(refusal.value)


@pytest.mark.parametrize(("pattern", "problem"), INVALID, ids=[problem for _, problem in INVALID])
def test_an_invalid_expression_is_refused_by_name(pattern: str, problem: str) -> None:
    with pytest.raises(AdapterRejectedError, match=rf"layers_pattern: .* no valid .*{problem}") as refusal:
        match_paths([expression("a"), expression(pattern, "layers_pattern")], PATHS)
    assert len(str(refusal.value).encode()) < 500


@pytest.mark.parametrize("body", ["a{1000}", ".{1000}"])
def test_nested_counts_are_no_way_to_take_memory(body: str) -> None:
    nested = f"(?:(?:(?:(?:{body}){{1000}}){{1000}}){{1000}}){{1000}}"
    asked = expression(nested)
    assert match_paths([asked], PATHS) == {asked: {}}


def test_a_long_expression_is_refused_before_it_is_tried() -> None:
    with pytest.raises(AdapterRejectedError, match=r"target_modules: .* longer than"):
        match_paths([expression("a" * (MAX_PATTERN_CHARS + 1))], PATHS)
    longest = expression("a" * MAX_PATTERN_CHARS)
    assert match_paths([longest], PATHS) == {longest: {}}


def test_a_child_that_makes_no_progress_is_given_up() -> None:
    # What earlier tests started may still be there.
    before = set(psutil.Process().children())
    with pytest.raises(AdapterRejectedError, match=r"target_modules: .* had not ended after 0\.3 seconds"):
        match_paths([expression(ENDLESS[0])], PATHS, wall_seconds=0.3)
    assert set(psutil.Process().children()) <= before


def test_a_child_that_is_killed_is_an_error_that_names_the_option() -> None:
    refusals: list[str] = []

    def match() -> None:
        with pytest.raises(AdapterRejectedError) as refusal:
            match_paths([expression("x", "exclude_modules"), expression(ENDLESS[0])], PATHS)
        refusals.append(str(refusal.value))

    before = set(psutil.Process().children())
    thread = threading.Thread(target=match)
    thread.start()
    deadline = time.monotonic() + 10
    while not (started := set(psutil.Process().children()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = started
    # Its work lies behind the first answer: that it has used some time shows that it is there.
    while child.cpu_times().user < 0.3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.terminate()
    thread.join(10)
    assert len(refusals) == 1
    assert "target_modules: the pattern" in refusals[0]
    assert "ended with status -15" in refusals[0]
