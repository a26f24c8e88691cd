"""A base model's configuration, read from its checkpoint folder. Imports no torch: the front end reads it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from segue.engine.lora.manifest import Projection


class ModelError(ValueError):
    """The checkpoint folder cannot be served. The message is one line that names what is wrong."""


class UnsupportedModelError(ModelError):
    """The checkpoint is sound but asks for something that is not implemented; the message names it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama model's shape. Widths are in features. ``dtype`` is the checkpoint's own, by its torch name.

    ``eos_token_ids`` end an answer: those of generation_config.json, else those of config.json.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    rope: RopeConfig

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json. Raises ModelError."""
        generation_path = model_dir / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        return cls.from_json(_read_json(model_dir / "config.json"), generation)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """The configuration in the parsed files, spelled as by transformers 4 or 5. Raises ModelError."""
        _refuse_unsupported(config)
        hidden_size, heads = _positive_int(config, "hidden_size"), _positive_int(config, "num_attention_heads")
        kv_heads = _positive_int(config, "num_key_value_heads", heads)
        head_dim = _positive_int(config, "head_dim", hidden_size // heads)
        if heads % kv_heads:
            raise ModelError(f"num_attention_heads: {heads} is no multiple of num_key_value_heads, {kv_heads}")
        if head_dim % 2:
            raise ModelError(f"head_dim: must be even for rotary embeddings, is {head_dim}")
        max_positions = _positive_int(config, "max_position_embeddings")
        return cls(
            hidden_size=hidden_size,
            layers=_positive_int(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_positive_int(config, "intermediate_size"),
            vocab_size=_positive_int(config, "vocab_size"),
            rms_norm_eps=_positive_float(config, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_eos_token_ids(config, generation),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            rope=_rope(config, max_positions),
        )

    def projection_shapes(self) -> Mapping[Projection, tuple[int, int]]:
        """(in_features, out_features) of every linear layer of a transformer layer, in the order of Projection."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            Projection.Q: (self.hidden_size, query),
            Projection.K: (self.hidden_size, key),
            Projection.V: (self.hidden_size, key),
            Projection.O: (query, self.hidden_size),
            Projection.GATE: (self.hidden_size, self.intermediate_size),
            Projection.UP: (self.hidden_size, self.intermediate_size),
            Projection.DOWN: (self.intermediate_size, self.hidden_size),
        }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise UnsupportedModelError(f"model_type: {config.get('model_type')!r} is not supported; supported is 'llama'")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UnsupportedModelError(f"{key}: models with biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act: {config['hidden_act']!r} is not supported; supported is 'silu'")
    if config.get("quantization_config"):
        raise UnsupportedModelError("quantization_config: quantised checkpoints are not supported")


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    """Transformers 5 has all in ``rope_parameters``, 4 has ``rope_theta`` beside ``rope_scaling``."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelError("rope_parameters: must be an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("rope_parameters: one set for each layer type is not supported")
    name = rope.get("rope_type", rope.get("type", "default"))
    known = [rope_type.value for rope_type in RopeType]
    if name not in known:
        raise UnsupportedModelError(f"rope_type: {name!r} is not supported; supported are {', '.join(known)}")
    for source in (config, rope):
        if source.get("partial_rotary_factor") not in (None, 1.0):
            raise UnsupportedModelError("partial_rotary_factor: rotating a part of each head is not supported")

    rope_type = RopeType(name)
    fields: dict[str, Any] = {"type": rope_type}
    fields["theta"] = _positive_float(rope, "rope_theta", _positive_float(config, "rope_theta", 10_000.0))
    if rope_type is RopeType.LINEAR:
        fields["factor"] = _positive_float(rope, "factor")
    elif rope_type in (RopeType.YARN, RopeType.LLAMA3):
        fields |= _long_context_rope(config, rope, max_positions, rope_type)
    return RopeConfig(**fields)


def _long_context_rope(
    config: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int, rope_type: RopeType
) -> dict[str, Any]:
    # Some checkpoints have the pretraining length beside the rope parameters; transformers lets that one win.
    outer = config if config.get("original_max_position_embeddings") is not None else rope
    original = _positive_int(outer, "original_max_position_embeddings", max_positions)
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    if rope_type is RopeType.LLAMA3:
        fields["factor"] = _positive_float(rope, "factor")
        fields["low_freq_factor"] = _positive_float(rope, "low_freq_factor")
        fields["high_freq_factor"] = _positive_float(rope, "high_freq_factor")
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise ModelError("high_freq_factor: must be greater than low_freq_factor")
        return fields
    fields["factor"] = _positive_float(rope, "factor", max_positions / original)
    fields["beta_fast"] = _positive_float(rope, "beta_fast", 32.0)
    fields["beta_slow"] = _positive_float(rope, "beta_slow", 1.0)
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key):
            fields[key] = _positive_float(rope, key)
    fields["truncate"] = bool(rope.get("truncate", True))
    return fields


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    for source in (generation, config):
        ids = source.get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ModelError(f"eos_token_id: must be an integer or a list of integers, is {ids!r}")
        return tuple(ids)
    return ()


def _positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{key}: must be an integer greater than 0, is {value!r}")
    return value


def _positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"{key}: must be a number greater than 0, is {value!r}")
    return float(value)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content
