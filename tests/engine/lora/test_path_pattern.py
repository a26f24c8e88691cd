"""Patterns against ``re`` and PEFT: the same matches, or a refusal; and never more work than allowed."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import MAX_WORK_STEPS, keyed_values, module_path, other_paths, targeted_modules
from segue.engine.lora.path_pattern import PathPattern
from segue.engine.lora.pattern_syntax import MAX_GROUP_DEPTH, MAX_PATTERN_CHARS, PatternError, PatternWork
from segue.engine.lora.peft_config import parse_peft_config
from segue.errors import AdapterRejectedError
from tests.engine.lora.adapter_folders import peft_config

LAYERS = 12
SERVED = [module_path(layer, projection) for layer in range(LAYERS) for projection in Projection]
OTHERS = list(other_paths(LAYERS))

atoms = st.sampled_from(["a", "b", "1", ".", r"\.", r"\d", r"\W", "[ab]", "[^a.]", r"[\d.-]", "[]a]", "^", "$", r"\b"])
repeats = st.sampled_from(["*", "+", "?", "*?", "??", "{2}", "{1,3}", "{,2}", "{2,}", "{0}"])
frames = st.sampled_from(["({})", "(?:{})", "(?={})", "(?!{})", "(?<={})", "(?<!{})", "(?P<n>{})"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}|{}".format, inner, inner),
        st.builds("(?:{}){}".format, inner, repeats),
        st.builds(str.format, frames, inner),
    ),
    max_leaves=8,
)
soup = st.text("ab1.\\[]()|*+?{},^$-&~d:=!<>P#", max_size=10)

names = st.sampled_from(
    ["model", "layers", "self_attn", "mlp", "q_proj", "up_proj", "_proj", "proj", "[a-z]+", "[qkv]", "lm_head", "1", ""]
)
marks = st.sampled_from([".", r"\.", r"\d", r"\d+", "[0-2]", "1[01]", "[^.]+", ".*", ".*?", "^", "$"])
pieces = st.one_of(
    names,
    marks,
    st.builds("(?:{}|{})".format, names, names),
    st.builds("({}{})?".format, names, marks),
    st.builds("(?!.*{})".format, names),
)
path_patterns = st.one_of(
    st.lists(pieces, min_size=1, max_size=5).map("".join),
    st.builds(".*{}.*{}".format, names, names),
    st.builds(r".*\.{}\.(?:self_attn|mlp)\.{}_proj".format, st.sampled_from([r"\d+", "[02]", "1.", "(?:3|7)"]), pieces),
    st.builds("{}|{}".format, names, pieces),
)


def work() -> PatternWork:
    return PatternWork(MAX_WORK_STEPS)


def parse(**options: Any) -> object:
    return parse_peft_config(json.dumps(peft_config(**options)).encode(), LAYERS)


@given(st.one_of(patterns, soup), st.lists(st.text("ab1.-_", min_size=1, max_size=8), min_size=1, max_size=5))
def test_what_is_not_refused_matches_as_in_re(pattern: str, paths: list[str]) -> None:
    try:
        ours = PathPattern(pattern, work())
    except PatternError:
        assume(False)
    theirs = re.compile(pattern)
    for path in paths:
        assert ours.match(path) == bool(theirs.match(path))
        assert ours.fullmatch(path) == bool(theirs.fullmatch(path))


@given(
    target=st.one_of(
        path_patterns, st.lists(st.sampled_from(["q_proj", "mlp.up_proj", "1.self_attn.o_proj"]), min_size=1)
    ),
    exclude=st.one_of(st.none(), path_patterns, st.lists(st.sampled_from(["q_proj", "proj", "11.mlp.up_proj"]))),
    chosen=st.one_of(st.none(), st.integers(-1, LAYERS), st.lists(st.integers(0, LAYERS))),
    layers_pattern=st.one_of(st.none(), path_patterns, st.lists(path_patterns, max_size=2)),
)
def test_modules_are_targeted_as_in_peft(target: Any, exclude: Any, chosen: Any, layers_pattern: Any) -> None:
    if isinstance(target, str) or chosen is None:
        layers_pattern = None
    options = {
        "target_modules": target,
        "exclude_modules": exclude,
        "layers_to_transform": None if isinstance(target, str) else chosen,
        "layers_pattern": layers_pattern,
    }
    try:
        found = set(targeted_modules(options, LAYERS, work()).values())
        refusal = ""
    except AdapterRejectedError as error:
        found, refusal = set(), str(error)
        # PEFT answers these too, for models of other modules or in ways that are not served.
        assume("means" in refusal)
    expected = {path for path in SERVED if _is_targeted_in_peft(options, path)}
    others = {path for path in OTHERS if _is_targeted_in_peft(options, path)}
    if "means no projection" in refusal or not refusal:
        assert (found, others) == (expected, set())
    else:
        assert any(repr(path) in refusal for path in others)


def _is_targeted_in_peft(options: dict[str, Any], path: str) -> bool:
    return bool(check_target_module_exists(SimpleNamespace(**options), path))


@given(st.lists(path_patterns, max_size=4, unique=True))
def test_keys_of_patterns_are_found_as_in_peft(keys: list[str]) -> None:
    try:
        value_of = keyed_values(
            {"rank_pattern": {key: index for index, key in enumerate(keys)}}, "rank_pattern", work()
        )
    except AdapterRejectedError:
        assume(False)
    for path in SERVED:
        found = get_pattern_key(keys, path)
        assert value_of(path, -1) == (keys.index(found) if found in keys else -1)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"(a)\1", "not supported"),
        ("(?P<x>a)(?P=x)", r"\(\?P= is not supported"),
        ("(a)?(?(1)b|c)", "not supported"),
        ("(?>a+)b", "not supported"),
        ("a*+", "possessive"),
        ("(?i)a", "not supported"),
        ("(?i:a)", "not supported"),
        ("(?#a)", "not supported"),
        (r"\x61", "not supported"),
        (r"\p{L}", "not supported"),
        (r"[\x00-\U0010ffff]", "not supported"),
        ("[[:alpha:]]", "use backslashes"),
        ("[a--b]", "use backslashes"),
        ("[b-a]", "malformed"),
        ("a**", "repeats a repeat"),
        ("*a", "nothing to repeat"),
        ("^*", "nothing to repeat"),
        ("(a*)*", "may be empty"),
        ("(?=a)+", "may be empty"),
        ("a{x}", "digits"),
        ("a{3,2}", "least count"),
        ("a{99999}", "at most 4 digits"),
        ("{", "backslash"),
        ("(?<=a+)b", "fixed width"),
        ("(?P<n>a)(?P<n>b)", "twice"),
        ("(a", "unterminated"),
        ("a)", "unbalanced"),
        ("[a", "unterminated"),
        ("[a\\", "unterminated"),
        ("a\\", "not supported"),
        ("ä", "beyond ASCII"),
        ("a" * (MAX_PATTERN_CHARS + 1), "longer than"),
        ("(" * (MAX_GROUP_DEPTH + 1) + ")" * (MAX_GROUP_DEPTH + 1), "nested deeper"),
    ],
)
def test_syntax_that_is_not_served_is_refused_by_name(pattern: str, problem: str) -> None:
    with pytest.raises(PatternError, match=problem):
        PathPattern(pattern, work())


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "([a-z_.0-9]+)+X",
        "(([a-z_.0-9]+)+)+X",
        "(.|[a-z])+X",
        "(?:a{1000}){1000}",
        "(?:.{1,1000}){1,1000}X",
        "(?:(?:(?:.{1,100}){1,100}){1,100}){1,100}X",
        ".*" * 8000 + "X",
        "(?=.*" * 15 + "X" + ")" * 15,
        "(?:.(?=.*X|))*" * 900,
        "".join(f"[a-{chr(98 + index % 24)}{index}]?" for index in range(1700)) + "X",
    ],
    ids=lambda pattern: pattern[:30],
)
def test_a_hostile_pattern_ends_with_a_refusal_that_names_the_option(pattern: str) -> None:
    def refuse(named: str, **options: Any) -> None:
        with pytest.raises(AdapterRejectedError, match=named):
            targeted_modules(peft_config(**options), LAYERS, PatternWork(200_000))

    refuse("target_modules", target_modules=pattern)
    refuse("exclude_modules", exclude_modules=f"(?:{pattern})?.*")
    refuse("layers_pattern", layers_to_transform=1, layers_pattern=pattern)


@pytest.mark.parametrize("key", ["a{}", "[a]{}", "(a|b)*{}", "^model.layers.{}"])
def test_too_many_keys_are_refused(key: str) -> None:
    keys = {key.format(index): 4 for index in range(5000)}
    with pytest.raises(AdapterRejectedError, match=r"rank_pattern.*too many steps"):
        _values_of_all(keys, PatternWork(100_000))


def _values_of_all(keys: dict[str, int], limited: PatternWork) -> list[int | float]:
    value_of = keyed_values({"rank_pattern": keys}, "rank_pattern", limited)
    return [value_of(path, 8) for path in SERVED]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_the_work_for_one_adapter_is_bounded(option: str) -> None:
    costly = ".*" * 8000 + "X"
    with pytest.raises(AdapterRejectedError, match=rf"{option}.*too many steps"):
        parse(**{option: {costly: 4} if option.endswith("_pattern") else costly})


def test_a_key_for_each_module_of_a_large_model_is_served() -> None:
    layers = 126
    paths = [module_path(layer, projection) for layer in range(layers) for projection in Projection]
    config = peft_config(
        target_modules=paths,
        rank_pattern={path: 1 + index % 7 for index, path in enumerate(paths)},
        alpha_pattern={path: 1 + index % 5 for index, path in enumerate(paths)},
    )
    rules = parse_peft_config(json.dumps(config).encode(), layers)
    assert [rule.rank for rule in rules.values()] == [1 + index % 7 for index in range(len(paths))]
    assert [rule.alpha for rule in rules.values()] == [1 + index % 5 for index in range(len(paths))]
