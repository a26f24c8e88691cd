"""Which modules of the base model PEFT's target options mean, by PEFT's own rules (``check_target_module_exists``).

Only the seven projections of each layer are served: a target that means another module is refused by its name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from segue.engine.lora.manifest import Projection
from segue.engine.lora.path_pattern import PathPattern
from segue.engine.lora.pattern_syntax import Choice, PatternError, PatternWork, parse_pattern
from segue.engine.lora.strict_json import quoted
from segue.errors import AdapterRejectedError

MLP = frozenset({Projection.GATE, Projection.UP, Projection.DOWN})
ALL_LINEAR = "all-linear"
# A plain key for each module in both patterns takes about 310,000 steps in a model of 80 layers.
MAX_WORK_STEPS = 2_000_000

Module = tuple[int, Projection]
"""A projection of a layer."""

_LARGEST = sys.float_info.max
_Matches = Callable[[str], bool]
_PLAIN_KEY = re.compile(r"(\^?)([A-Za-z0-9_.]*)\$?")
_ALONE = ("lm_head", "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
_IN_LAYER = ("", ".input_layernorm", ".mlp", ".mlp.act_fn", ".post_attention_layernorm", ".self_attn")


def module_path(layer: int, projection: Projection) -> str:
    """A projection's name within transformers' decoder models: ``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if projection in MLP else "self_attn"
    return f"model.layers.{layer}.{block}.{projection.value}"


def other_paths(layers: int) -> Iterable[str]:
    """The names of a decoder model's modules that are no projections, those that only some families have aside."""
    yield from _ALONE
    for layer in range(layers):
        for suffix in _IN_LAYER:
            yield f"model.layers.{layer}{suffix}"


def refused(problem: str) -> AdapterRejectedError:
    """The error for something in the configuration."""
    return AdapterRejectedError(f"adapter_config.json: {problem}")


def targeted_modules(config: Mapping[str, Any], layers: int, work: PatternWork) -> dict[Module, str]:
    """The targeted projections of a model of ``layers`` layers, with their paths, in the model's order.

    Reads target_modules, exclude_modules, layers_to_transform and layers_pattern. Raises AdapterRejectedError naming
    the option that is wrong, means a module that is not served, or leaves nothing targeted.
    """
    paths = {
        module_path(layer, projection): (layer, projection) for layer in range(layers) for projection in Projection
    }
    target = config.get("target_modules")
    is_targeted = _target(target, paths, work)
    is_excluded = _exclusion(config.get("exclude_modules"), work)
    is_in_layers = _layer_choice(config, work)
    found = {
        module: path
        for path, module in paths.items()
        if not is_excluded(path) and is_targeted(path) and is_in_layers(path)
    }
    for path in other_paths(layers):
        if is_targeted(path) and not is_excluded(path) and is_in_layers(path):
            raise refused(f"target_modules: {quoted(path)}, which {quoted(str(target))} means, is not supported")
    if not found:
        options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        given = " with ".join(option for option in options if config.get(option) not in (None, "", []))
        raise refused(f"{given} means no projection of the base model")
    return found


def keyed_values(
    config: Mapping[str, Any], option: str, work: PatternWork
) -> Callable[[str, int | float], int | float]:
    """rank_pattern or alpha_pattern as a function of path and default: the first key in the file that means the path.

    A key is a regular expression for a path's end, ``(.*\\.)?(KEY)$`` (PEFT's ``get_pattern_key``). One that means no
    module has no effect. Raises AdapterRejectedError, the function too.
    """
    pattern = config.get(option)
    if pattern is None:
        pattern = {}
    if not isinstance(pattern, dict):
        raise refused(f"{option} must be an object")
    keys: list[tuple[_Matches, int | float]] = []
    for key, value in pattern.items():
        with _naming(option, key):
            keys.append((_key_match(key, work), checked_number(value, f"{option}[{quoted(key)}]")))

    def value_of(path: str, default: int | float) -> int | float:
        with _naming(option):
            return next((value for matches, value in keys if matches(path)), default)

    return value_of


def checked_number(value: Any, where: str) -> int | float:
    """``value`` if it is a finite number, else AdapterRejectedError naming ``where`` it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return value
    raise refused(f"{where} must be a finite number, is {quoted(str(value))}")


def _target(target: Any, paths: Mapping[str, Module], work: PatternWork) -> _Matches:
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        return lambda path: path in paths
    if isinstance(target, str) and target:
        return _expression("target_modules", target, work)
    if not isinstance(target, list) or not target:
        raise refused("target_modules must be a list of names or a regular expression, and not empty")
    known = {suffix for path in paths for suffix in _suffixes(path)}
    for name in target:
        if not isinstance(name, str) or name not in known:
            served = ", ".join(projection.value for projection in Projection)
            raise refused(f"target_modules: {quoted(str(name))} is not supported; names of {served} are")
    return _ends_with_any(target)


def _exclusion(exclude: Any, work: PatternWork) -> _Matches:
    if exclude is None or exclude in ("", []):
        return lambda _path: False
    if isinstance(exclude, str):
        return _expression("exclude_modules", exclude, work)
    return _ends_with_any(_strings("exclude_modules", exclude))


def _layer_choice(config: Mapping[str, Any], work: PatternWork) -> _Matches:
    """Whether a path is in one of the layers of layers_to_transform, found behind a name of layers_pattern."""
    chosen, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    for option in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.get("target_modules"), str) and config.get(option) is not None:
            raise refused(f"{option} is not supported where target_modules is a string")
    pattern = [] if pattern is None or pattern == "" else pattern
    names = [pattern] if isinstance(pattern, str) else _strings("layers_pattern", pattern)
    if names and chosen is None:
        raise refused("layers_pattern is not supported without layers_to_transform")
    indices = [chosen] if isinstance(chosen, int) else [] if chosen is None else chosen
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise refused(f"layers_to_transform must be a whole number or a list of them, is {quoted(str(chosen))}")
    numbers = {str(index) for index in indices}
    behind = [_layer_name(name, work) for name in names]

    def is_chosen(path: str) -> bool:
        # No other part of these paths is a number, so that it is the one that PEFT finds if it finds any.
        number = next((part for part in path.split(".")[:-1] if part.isdigit()), None)
        return number in numbers and (not behind or any(matches(path) for matches in behind))

    return is_chosen if numbers else lambda _path: True


def _layer_name(name: str, work: PatternWork) -> _Matches:
    """PEFT sets the name into its own expression as it is: what keeps its meaning there is served."""
    with _naming("layers_pattern", name):
        parse_pattern(name, work)
        if isinstance(parse_pattern(f"x{name}", work), Choice):
            raise PatternError("alternatives belong into a group")
        expression = PathPattern(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", work)

    def matches(path: str) -> bool:
        with _naming("layers_pattern", name):
            return expression.match(path)

    return matches


def _key_match(key: str, work: PatternWork) -> _Matches:
    """``(.*\\.)?(key)$``: the key matches from the path's beginning or from behind a dot to the end."""
    plain = _PLAIN_KEY.fullmatch(key)
    if plain is None:
        expression = PathPattern(key, work)
        return lambda path: expression.reaches_end(path, (0, *(i + 1 for i, mark in enumerate(path) if mark == ".")))
    name = plain[2]

    # The keys that PEFT writes are plain names, and there may be one for each module: too many for a search each.
    def matches(path: str) -> bool:
        work.spend(1)
        start = len(path) - len(name)
        if start and (start < 0 or plain[1] or path[start - 1] != "."):
            return False
        return all(mine in (theirs, ".") for mine, theirs in zip(name, path[start:], strict=True))

    return matches


def _expression(option: str, pattern: str, work: PatternWork) -> _Matches:
    with _naming(option, pattern):
        expression = PathPattern(pattern, work)

    def matches(path: str) -> bool:
        with _naming(option, pattern):
            return expression.fullmatch(path)

    return matches


@contextmanager
def _naming(option: str, pattern: str | None = None) -> Iterator[None]:
    """What is wrong with a pattern is reported with the option's name."""
    try:
        yield
    except PatternError as error:
        where = option if pattern is None else f"{option}: the pattern {quoted(pattern)}"
        raise refused(f"{where} is not supported: {error}") from None


def _strings(option: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(f"{option} must be a string or a list of strings, is {quoted(str(value))}")
    return value


def _ends_with_any(names: Iterable[str]) -> _Matches:
    known = frozenset(names)
    return lambda path: not known.isdisjoint(_suffixes(path))


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
