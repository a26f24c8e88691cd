"""The parameters of rotary position embeddings, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from segue.engine.models.fields import ModelError, UnsupportedModelError, positive_float, positive_int


class RopeType(Enum):
    """The rotary embeddings that are implemented, by the names config.json uses."""

    DEFAULT = "default"
    LINEAR = "linear"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding parameters, named as in config.json. Fields that ``type`` does not use keep their default."""

    type: RopeType = RopeType.DEFAULT
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_json(cls, config: Mapping[str, Any], max_positions: int) -> RopeConfig:
        """The parameters in a parsed config.json of a model for ``max_positions`` tokens. Raises ModelError.

        Transformers 5 has all in ``rope_parameters``, 4 has ``rope_theta`` beside ``rope_scaling``.
        """
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ModelError("rope_parameters: must be an object")
        rope_type = _supported_type(config, rope)
        fields: dict[str, Any] = {"type": rope_type}
        fields["theta"] = positive_float(rope, "rope_theta", positive_float(config, "rope_theta", 10_000.0))
        if rope_type is RopeType.LINEAR:
            fields["factor"] = positive_float(rope, "factor")
        elif rope_type in (RopeType.YARN, RopeType.LLAMA3):
            fields |= _long_context(config, rope, max_positions, rope_type)
        return cls(**fields)


def _supported_type(config: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeType:
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("rope_parameters: one set for each layer type is not supported")
    for source in (config, rope):
        if source.get("partial_rotary_factor") not in (None, 1.0):
            raise UnsupportedModelError("partial_rotary_factor: rotating a part of each head is not supported")
    if rope.get("llama_4_scaling_beta"):
        raise UnsupportedModelError("llama_4_scaling_beta: scaling queries by position is not supported")
    name = rope.get("rope_type", rope.get("type", "default"))
    known = [rope_type.value for rope_type in RopeType]
    if name not in known:
        raise UnsupportedModelError(f"rope_type: {name!r} is not supported; supported are {', '.join(known)}")
    return RopeType(name)


def _long_context(
    config: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int, rope_type: RopeType
) -> dict[str, Any]:
    # Some checkpoints have the pretraining length beside the rope parameters; transformers lets that one win.
    outer = config if config.get("original_max_position_embeddings") is not None else rope
    original = positive_int(outer, "original_max_position_embeddings", max_positions)
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    if rope_type is RopeType.LLAMA3:
        fields["factor"] = positive_float(rope, "factor")
        fields["low_freq_factor"] = positive_float(rope, "low_freq_factor")
        fields["high_freq_factor"] = positive_float(rope, "high_freq_factor")
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ModelError("high_freq_factor: must be greater than low_freq_factor")
        return fields
    fields["factor"] = positive_float(rope, "factor", max_positions / original)
    fields["beta_fast"] = positive_float(rope, "beta_fast", 32.0)
    fields["beta_slow"] = positive_float(rope, "beta_slow", 1.0)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key):
            fields[key] = positive_float(rope, key)
    fields["truncate"] = bool(rope.get("truncate", True))
    return fields
