"""Modules, ranks and alphas against PEFT's own functions, and what it takes to decide them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from segue.engine.lora.keyed_values import KeyedValues
from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import TargetOptions, module_path, module_paths, other_paths
from segue.engine.lora.path_match import MAX_ENTRIES, match_paths
from segue.engine.lora.peft_config import ModuleRule, parse_peft_config
from segue.errors import AdapterRejectedError
from tests.engine.lora.adapter_folders import peft_config

LAYERS = 12
SERVED = list(module_paths(LAYERS))
OTHERS = list(other_paths(LAYERS))

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
    st.sampled_from(
        ["(?i:LAYERS)", "(?>[a-z]+)", "[a-z]++", "(?P<n>l)?(?(n)ayers|h)", "(a*)*", "(?P<m>[a-z]).*(?P=m)"]
    ),
)
path_patterns = st.one_of(
    st.lists(pieces, min_size=1, max_size=5).map("".join),
    st.builds(".*{}.*{}".format, names, names),
    st.builds(r".*\.{}\.(?:self_attn|mlp)\.{}_proj".format, st.sampled_from([r"\d+", "[02]", "1.", "(?:3|7)"]), pieces),
    st.builds("{}|{}".format, names, pieces),
)
plain_keys = st.sampled_from(
    [
        *(
            "",
            "^",
            "q_proj",
            "^q_proj",
            "v_proj$",
            "self.attn.v.proj",
            "1.mlp.up_proj",
            ".mlp.up_proj",
            "m..",
            "......",
        ),
        *("^model.layers.11.mlp.up_proj$", "model.layers.2.self_attn.q_proj", "layers.1..self_attn.k_proj"),
    ]
)
layer_patterns = st.one_of(st.sampled_from(["layers", "h", "model", "ayers", "model.layers"]), path_patterns)
suffixes = st.sampled_from(["q_proj", "mlp.up_proj", "1.self_attn.o_proj", "model.layers.3.mlp.down_proj"])


def parse(options: Mapping[str, Any], layers: int = LAYERS) -> Mapping[tuple[int, Projection], ModuleRule]:
    return parse_peft_config(json.dumps(peft_config(**options)).encode(), layers)


def targeted_paths(options: Mapping[str, Any]) -> set[str]:
    targets = TargetOptions.read(options, LAYERS)
    return set(targets.resolve(LAYERS, match_paths(targets.expressions, [*SERVED, *OTHERS])).values())


@settings(deadline=None)
@given(
    target=st.one_of(path_patterns, st.lists(suffixes, min_size=1)),
    exclude=st.one_of(st.none(), path_patterns, st.lists(st.sampled_from(["q_proj", "proj", "11.mlp.up_proj"]))),
    chosen=st.one_of(st.none(), st.integers(-1, LAYERS), st.lists(st.integers(0, LAYERS))),
    layers_pattern=st.one_of(st.none(), layer_patterns, st.lists(layer_patterns, max_size=3)),
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
        found = targeted_paths(options)
        refusal = ""
    except AdapterRejectedError as error:
        found, refusal = set(), str(error)
        # PEFT fails at these too, where it gets to them.
        assume("no valid regular expression" not in refusal and target != "")
    expected = {path for path in SERVED if _is_targeted_in_peft(options, path)}
    others = {path for path in OTHERS if _is_targeted_in_peft(options, path)}
    if "means no projection" in refusal or not refusal:
        assert (found, others) == (expected, set())
    else:
        assert any(repr(path) in refusal for path in others)


def _is_targeted_in_peft(options: dict[str, Any], path: str) -> bool:
    return bool(check_target_module_exists(SimpleNamespace(**options), path))


@settings(deadline=None)
@given(st.lists(st.one_of(plain_keys, path_patterns), max_size=6, unique=True))
def test_keys_of_patterns_are_found_as_in_peft(keys: list[str]) -> None:
    values = KeyedValues.read({"rank_pattern": {key: index for index, key in enumerate(keys)}}, "rank_pattern")
    try:
        found = match_paths(values.expressions, SERVED)
    except AdapterRejectedError as error:
        assume("no valid regular expression" not in str(error))
        raise
    for path in SERVED:
        meant = get_pattern_key(keys, path)
        assert values.value_of(path, -1, found) == (keys.index(meant) if meant in keys else -1)


def test_a_whole_path_is_targeted_in_every_layer_as_in_peft() -> None:
    options = {
        "target_modules": ["model.layers.3.mlp.down_proj", "q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    }
    expected = {"model.layers.3.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    assert {path for path in SERVED if _is_targeted_in_peft(options, path)} == expected
    assert targeted_paths(options) == expected


def test_what_stands_in_place_of_a_layers_number_is_refused() -> None:
    # A comment hides PEFT's own group, and the pattern brings one of the same name.
    options = {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": r".*\.(?P<idx>self_attn)|(?#",
    }
    with pytest.raises(ValueError, match="invalid literal for int"):
        _is_targeted_in_peft(options, SERVED[0])
    with pytest.raises(AdapterRejectedError, match=r"layers_pattern: .* finds 'self_attn', which is no layer"):
        targeted_paths(options)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_the_work_for_one_adapter_is_bounded(option: str) -> None:
    costly = "(?:[a-z_.0-9]+)+X"
    with pytest.raises(AdapterRejectedError, match=rf"json: {option}: .*takes too much time or memory"):
        parse({option: {"q_proj": 2, costly: 4} if option.endswith("_pattern") else costly})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:(?:a{1000}){1000}){1000}"])
def test_what_looks_hostile_but_ends_early_means_nothing(pattern: str) -> None:
    with pytest.raises(AdapterRejectedError, match="target_modules means no projection"):
        parse({"target_modules": pattern})
    assert parse({"rank_pattern": {pattern: 2}}) == parse({})


@pytest.mark.parametrize("key", ["a{}", "[a]{}"])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern", "layers_pattern"])
def test_too_many_patterns_are_refused(option: str, key: str) -> None:
    keys = [key.format(index) for index in range(MAX_ENTRIES + 1)]
    value = keys if option == "layers_pattern" else dict.fromkeys(keys, 4)
    with pytest.raises(AdapterRejectedError, match=f"{option} has more than {MAX_ENTRIES} entries"):
        parse({"layers_to_transform": 1, option: value})


@pytest.mark.parametrize("escaped", [False, True])
def test_a_key_for_each_module_of_a_large_model_is_served(escaped: bool) -> None:
    layers = 126
    paths = [module_path(layer, projection) for layer in range(layers) for projection in Projection]
    keys = [path.replace(".", r"\.") if escaped else path for path in paths]
    options = {
        "target_modules": paths,
        "rank_pattern": {key: 1 + index % 7 for index, key in enumerate(keys)},
        "alpha_pattern": {key: 1 + index % 5 for index, key in enumerate(keys)},
    }
    rules = parse(options, layers)
    assert [rule.rank for rule in rules.values()] == [1 + index % 7 for index in range(len(paths))]
    assert [rule.alpha for rule in rules.values()] == [1 + index % 5 for index in range(len(paths))]


PLAIN: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    {"target_modules": ["q_proj", "1.mlp.up_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
    {"rank_pattern": {"q_proj": 2, "^model.layers.1.self_attn.v_proj$": 3}, "alpha_pattern": {"layers.1.mlp": 3}},
]


@pytest.mark.parametrize("options", PLAIN)
def test_plain_names_start_no_process(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    started: list[object] = []

    def fake_run(command: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=b'{"found": {}}\n')

    monkeypatch.setattr(subprocess, "run", fake_run)
    rules = parse(options)
    assert (len(rules) > 0, started) == (True, [])
    assert parse({**options, "exclude_modules": ".*x"})
    assert len(started) == 1
