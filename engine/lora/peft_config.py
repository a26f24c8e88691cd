"""Reading PEFT's adapter_config.json: what is served is checked, everything else is refused by name.

PEFT ignores what it does not know, and several of its options change the forward pass without leaving a trace in the
weights file. So an option is either understood here, known not to matter, or off; else the adapter is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segue.engine.lora.keyed_values import KeyedValues, checked_number
from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import TargetOptions, module_paths, other_paths
from segue.engine.lora.path_match import match_paths, refused
from segue.engine.lora.strict_json import parse_object, quoted
from segue.errors import AdapterRejectedError

_CHECKED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "use_rslora",
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
    """What the configuration says of one targeted projection: delta = scale B (A x).

    ``scale`` is alpha / rank, or alpha / sqrt(rank) with ``rank_stabilised`` (rsLoRA, arXiv:2312.03732).
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def parse_peft_config(data: bytes, layers: int) -> Mapping[tuple[int, Projection], ModuleRule]:
    """The targeted projections of a model of ``layers`` layers, each with its rank and scale.

    Options have PEFT's meaning: ``target_modules`` (list, regular expression or "all-linear"), ``exclude_modules``,
    ``layers_to_transform``, ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``, ``use_rslora``. Raises
    AdapterRejectedError naming the option that is wrong, not served, or takes too much time or memory. Blocks while a
    child process matches regular expressions, if there are any.
    """
    try:
        config = parse_object(data)
    except ValueError as error:
        raise AdapterRejectedError(f"adapter_config.json {error}") from None
    _refuse_other_kinds(config)
    ranks, alphas = KeyedValues.read(config, "rank_pattern"), KeyedValues.read(config, "alpha_pattern")
    targets = TargetOptions.read(config, layers)
    default_rank = checked_number(config.get("r"), "r")
    default_alpha = checked_number(config.get("lora_alpha"), "lora_alpha")
    stabilised = config.get("use_rslora") or False
    if not isinstance(stabilised, bool):
        raise refused(f"use_rslora must be true or false, is {quoted(str(stabilised))}")
    paths = [*module_paths(layers), *other_paths(layers)]
    # All at once: each call may start a process.
    found = match_paths([*targets.expressions, *ranks.expressions, *alphas.expressions], paths)
    rules = {}
    for module, path in targets.resolve(layers, found).items():
        rank, alpha = ranks.value_of(path, default_rank, found), alphas.value_of(path, default_alpha, found)
        if not isinstance(rank, int) or rank <= 0:
            raise refused(f"the rank of {path} must be a whole number greater than 0, is {rank}")
        rules[module] = ModuleRule(rank=rank, alpha=float(alpha), rank_stabilised=stabilised)
    return rules


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise refused(f"peft_type must be 'LORA', is {quoted(str(kind))}")
    bias = config.get("bias", "none")
    if bias != "none":
        raise refused(f"bias {quoted(str(bias))} is not supported, only 'none'")
    initialisation = config.get("init_lora_weights", True)
    if not isinstance(initialisation, bool) and initialisation not in _PLAIN_INITIALISATIONS:
        raise refused(f"init_lora_weights {quoted(str(initialisation))} is not supported: it changes the base model")
    for option, value in config.items():
        if option not in _CHECKED and option not in _WITHOUT_EFFECT and not _is_off(value):
            raise refused(f"{quoted(option)} is not supported")


def _is_off(value: Any) -> bool:
    # By identity, not truth: the number 0 may mean something.
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
