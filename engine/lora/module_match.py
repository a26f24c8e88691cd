"""Which modules of the base model PEFT's target options mean, by PEFT's own rules (``check_target_module_exists``).

Only the seven projections of each layer are served: a target that means another module is refused by its name. Lists
and plain names are decided here; what is a regular expression is left to ``path_match``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from segue.engine.lora.manifest import Projection
from segue.engine.lora.path_match import MAX_ENTRIES, Expression, Found, refused
from segue.engine.lora.strict_json import quoted

MLP = frozenset({Projection.GATE, Projection.UP, Projection.DOWN})
ALL_LINEAR = "all-linear"

Module = tuple[int, Projection]
"""A projection of a layer."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+")
_ALONE = ("lm_head", "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
_IN_LAYER = ("", ".input_layernorm", ".mlp", ".mlp.act_fn", ".post_attention_layernorm", ".self_attn")


def module_path(layer: int, projection: Projection) -> str:
    """A projection's name within transformers' decoder models: ``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if projection in MLP else "self_attn"
    return f"model.layers.{layer}.{block}.{projection.value}"


def module_paths(layers: int) -> dict[str, Module]:
    """The projections of a model of ``layers`` layers by their paths, in the model's order."""
    return {module_path(layer, projection): (layer, projection) for layer in range(layers) for projection in Projection}


def other_paths(layers: int) -> Iterable[str]:
    """The names of a decoder model's modules that are no projections, those that only some families have aside."""
    yield from _ALONE
    for layer in range(layers):
        for suffix in _IN_LAYER:
            yield f"model.layers.{layer}{suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetOptions:
    """target_modules, exclude_modules, layers_to_transform and layers_pattern, each checked by itself.

    ``target`` and ``exclude`` are an expression or the names that a path may end with; ``layers`` is empty for all.
    """

    given: Mapping[str, Any]
    target: Expression | frozenset[str]
    exclude: Expression | frozenset[str]
    layers: frozenset[int]
    layer_names: tuple[Expression | str, ...]

    @classmethod
    def read(cls, config: Mapping[str, Any], layers: int) -> TargetOptions:
        """The options for a model of ``layers`` layers. Raises AdapterRejectedError naming the one that is wrong."""
        options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        given = {option: config[option] for option in options if config.get(option) is not None}
        if isinstance(given.get("target_modules"), str):
            for option in options[2:]:
                if option in given:
                    raise refused(f"{option} is not supported where target_modules is a string")
        names = _layer_names(given.get("layers_pattern", []))
        if names and "layers_to_transform" not in given:
            raise refused("layers_pattern is not supported without layers_to_transform")
        return cls(
            given=given,
            target=_target(given.get("target_modules"), module_paths(layers)),
            exclude=_exclusion(given.get("exclude_modules", [])),
            layers=_chosen_layers(given.get("layers_to_transform", [])),
            layer_names=names,
        )

    @property
    def expressions(self) -> list[Expression]:
        """What has to be matched before ``resolve``."""
        return [item for item in (self.target, self.exclude, *self.layer_names) if isinstance(item, Expression)]

    def resolve(self, layers: int, found: Found) -> dict[Module, str]:
        """The targeted projections with their paths, in the model's order. ``found`` is what the expressions match.

        Raises AdapterRejectedError if another module is targeted, or none.
        """
        targeted = {module: path for path, module in module_paths(layers).items() if self._is_targeted(path, found)}
        for path in other_paths(layers):
            if self._is_targeted(path, found):
                target = quoted(str(self.given["target_modules"]))
                raise refused(f"target_modules: {quoted(path)}, which {target} means, is not supported")
        if not targeted:
            given = " with ".join(option for option, value in self.given.items() if value not in ("", []))
            raise refused(f"{given} means no projection of the base model")
        return targeted

    def _is_targeted(self, path: str, found: Found) -> bool:
        if _means(self.exclude, path, found) or not _means(self.target, path, found):
            return False
        # PEFT looks at the layers only of those that are not named by their whole path.
        if not self.layers or (isinstance(self.target, frozenset) and path in self.target):
            return True
        return self._layer_of(path, found) in self.layers

    def _layer_of(self, path: str, found: Found) -> int | None:
        """The layer's number where PEFT finds it: behind the first of the names that is in the path."""
        parts = path.split(".")
        numbers = {name: number for name, number in pairwise(parts[:-1]) if number.isdigit()}
        if not self.layer_names:
            # No other part of these paths is a number, so that it is the one that PEFT finds if it finds any.
            return next((int(number) for number in numbers.values()), None)
        for name in self.layer_names:
            if isinstance(name, str):
                if name in numbers:
                    return int(numbers[name])
            elif path in found[name]:
                return _number_behind(name, found[name][path])
        return None


def _target(target: Any, paths: Mapping[str, Module]) -> Expression | frozenset[str]:
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        return frozenset(paths)
    if isinstance(target, str) and target:
        return Expression(option="target_modules", pattern=target, regex=target, whole=True)
    if not isinstance(target, list) or not target:
        raise refused("target_modules must be a list of names or a regular expression, and not empty")
    known = {suffix for path in paths for suffix in _suffixes(path)}
    for name in target:
        if not isinstance(name, str) or name not in known:
            served = ", ".join(projection.value for projection in Projection)
            raise refused(f"target_modules: {quoted(str(name))} is not supported; names of {served} are")
    return frozenset(target)


def _exclusion(exclude: Any) -> Expression | frozenset[str]:
    if isinstance(exclude, str) and exclude:
        return Expression(option="exclude_modules", pattern=exclude, regex=exclude, whole=True)
    return frozenset(_strings("exclude_modules", [] if exclude == "" else exclude))


def _chosen_layers(chosen: Any) -> frozenset[int]:
    indices = [chosen] if isinstance(chosen, int) else chosen
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise refused(f"layers_to_transform must be a whole number or a list of them, is {quoted(str(chosen))}")
    return frozenset(indices)


def _layer_names(pattern: Any) -> tuple[Expression | str, ...]:
    """PEFT sets each name into its own expression as it is."""
    if pattern == "":
        return ()
    names = [pattern] if isinstance(pattern, str) else _strings("layers_pattern", pattern)
    if len(names) > MAX_ENTRIES:
        raise refused(f"layers_pattern has more than {MAX_ENTRIES} entries")
    return tuple(
        name
        if _PLAIN_NAME.fullmatch(name)
        else Expression(option="layers_pattern", pattern=name, regex=rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.")
        for name in names
    )


def _number_behind(name: Expression, text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        problem = f"finds {quoted(text or '')}, which is no layer's number"
        raise refused(f"layers_pattern: the pattern {quoted(name.pattern)} {problem}") from None


def _strings(option: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refused(f"{option} must be a string or a list of strings, is {quoted(str(value))}")
    return value


def _means(option: Expression | frozenset[str], path: str, found: Found) -> bool:
    if isinstance(option, Expression):
        return path in found[option]
    return not option.isdisjoint(_suffixes(path))


def _suffixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
