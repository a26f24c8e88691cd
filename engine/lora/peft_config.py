"""Reading PEFT's adapter_config.json: what is served is checked, everything else is refused by name.

PEFT ignores what it does not know, and several of its options change the forward pass without leaving a trace in the
weights file. So an option is either understood here, known not to matter, or off; else the adapter is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segue.engine.lora.manifest import Projection
from segue.engine.lora.strict_json import parse_object, quoted
from segue.errors import AdapterRejectedError

MLP = frozenset({Projection.GATE, Projection.UP, Projection.DOWN})

_CHECKED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "bias",
        "init_lora_weights",
    }
)
# These describe where the adapter came from or how it was trained; the forward pass does not depend on them.
# qalora_group_size and megatron_core only count together with use_qalora and megatron_config, which must be off.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
# Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq, lora_ga, eva) change the
# base model or the adapter when PEFT loads it.
_PLAIN_INITIALISATIONS = ("gaussian", "orthogonal", "mica")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRule:
    """What the configuration says of one targeted projection: delta = (alpha / rank) B (A x)."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def module_path(layer: int, projection: Projection) -> str:
    """A projection's name within transformers' decoder models: ``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if projection in MLP else "self_attn"
    return f"model.layers.{layer}.{block}.{projection.value}"


def parse_peft_config(data: bytes, layers: int) -> Mapping[tuple[int, Projection], ModuleRule]:
    """The targeted projections of a model of ``layers`` layers, each with its rank and alpha.

    Names in ``target_modules``, ``rank_pattern`` and ``alpha_pattern`` resolve as in PEFT: a module is meant by each
    dotted suffix of its path, and of several patterns that mean it the first in the file counts. Raises
    AdapterRejectedError naming the option that is wrong or not served.
    """
    try:
        config = parse_object(data)
    except ValueError as error:
        raise AdapterRejectedError(f"adapter_config.json {error}") from None
    _refuse_other_kinds(config)
    suffixes = {
        (layer, projection): _dotted_suffixes(module_path(layer, projection))
        for layer in range(layers)
        for projection in Projection
    }
    known = {suffix for names in suffixes.values() for suffix in names}
    targets = _targets(config, known)
    ranks = _pattern(config, "rank_pattern", known)
    alphas = _pattern(config, "alpha_pattern", known)
    default_rank, default_alpha = _required_number(config, "r"), _required_number(config, "lora_alpha")
    rules = {}
    for module, names in suffixes.items():
        if targets.isdisjoint(names):
            continue
        rank = _first_match(ranks, names, default_rank)
        alpha = _first_match(alphas, names, default_alpha)
        if not isinstance(rank, int) or rank <= 0:
            raise _rejected(f"the rank of {names[0]} must be a whole number greater than 0, is {rank}")
        rules[module] = ModuleRule(rank=rank, alpha=float(alpha))
    return rules


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _rejected(f"peft_type must be 'LORA', is {quoted(str(kind))}")
    bias = config.get("bias", "none")
    if bias != "none":
        raise _rejected(f"bias {quoted(str(bias))} is not supported, only 'none'")
    initialisation = config.get("init_lora_weights", True)
    if not isinstance(initialisation, bool) and initialisation not in _PLAIN_INITIALISATIONS:
        raise _rejected(f"init_lora_weights {quoted(str(initialisation))} is not supported: it changes the base model")
    for option, value in config.items():
        if option not in _CHECKED and option not in _WITHOUT_EFFECT and not _is_off(value):
            raise _rejected(f"{quoted(option)} is not supported")


def _is_off(value: Any) -> bool:
    # By identity, not truth: layers_to_transform = 0 means layer 0.
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _targets(config: Mapping[str, Any], known: set[str]) -> frozenset[str]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        raise _rejected(f"target_modules {quoted(targets)} is not supported: it must be a list of names, no pattern")
    if not isinstance(targets, list) or not targets:
        raise _rejected("target_modules must be a list of names and not empty")
    for target in targets:
        if not isinstance(target, str) or target not in known:
            raise _rejected(f"target_modules: {quoted(str(target))} is not supported; {_served()}")
    return frozenset(targets)


def _pattern(config: Mapping[str, Any], option: str, known: set[str]) -> dict[str, int | float]:
    """The pattern's keys in the file's order. A key that PEFT would read as an expression is not among the known."""
    pattern = config.get(option)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise _rejected(f"{option} must be an object")
    for key, value in pattern.items():
        if key not in known:
            raise _rejected(f"{option}: the key {quoted(key)} is not supported; {_served()}")
        _check_number(value, f"{option}[{quoted(key)}]")
    return pattern


def _first_match(pattern: Mapping[str, int | float], names: tuple[str, ...], default: int | float) -> int | float:
    return next((value for key, value in pattern.items() if key in names), default)


def _required_number(config: Mapping[str, Any], option: str) -> int | float:
    value = config.get(option)
    _check_number(value, option)
    assert isinstance(value, (int, float))
    return value


def _check_number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise _rejected(f"{where} must be a finite number, is {quoted(str(value))}")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _dotted_suffixes(path: str) -> tuple[str, ...]:
    parts = path.split(".")
    return tuple(".".join(parts[start:]) for start in range(len(parts)))


def _served() -> str:
    return "names of " + ", ".join(projection.value for projection in Projection) + " are"


def _rejected(problem: str) -> AdapterRejectedError:
    return AdapterRejectedError(f"adapter_config.json: {problem}")
