"""A base model's configuration, read from its checkpoint folder. Imports no torch: the front end reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.engine.lora.manifest import Projection
from segue.engine.models.family import Family
from segue.engine.models.fields import (
    ModelError,
    UnsupportedModelError,
    flag,
    positive_float,
    positive_int,
    read_json,
)
from segue.engine.models.rope_config import RopeConfig, RopeType

__all__ = ["ModelConfig", "ModelError", "RopeConfig", "RopeType", "UnsupportedModelError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape. Widths are in features. ``dtype`` is the checkpoint's own, by its torch name.

    ``sliding_windows`` has one entry a layer: a row at position p of a layer with window w sees the keys p - w + 1
    to p, and all up to p where it is None. ``qk_norm`` says that each head's query and key are normed before they are
    rotated. ``eos_token_ids`` end an answer: those of generation_config.json, else those of config.json.
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
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json. Raises ModelError."""
        generation_path = model_dir / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls.from_json(read_json(model_dir / "config.json"), generation)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        """The configuration in the parsed files, spelled as by transformers 4 or 5. Raises ModelError."""
        family = Family.from_json(config)
        hidden_size, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
        kv_heads = positive_int(config, "num_key_value_heads", heads)
        head_dim = positive_int(config, "head_dim", family.default_head_dim or hidden_size // heads)
        if heads % kv_heads:
            raise ModelError(f"num_attention_heads: {heads} is no multiple of num_key_value_heads, {kv_heads}")
        if head_dim % 2:
            raise ModelError(f"head_dim: must be even for rotary embeddings, is {head_dim}")
        layers = positive_int(config, "num_hidden_layers")
        max_positions = positive_int(config, "max_position_embeddings")
        return cls(
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=positive_int(config, "intermediate_size"),
            vocab_size=positive_int(config, "vocab_size"),
            rms_norm_eps=positive_float(config, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            tied_embeddings=flag(config, "tie_word_embeddings"),
            eos_token_ids=_eos_token_ids(config, generation),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            rope=RopeConfig.from_json(config, max_positions),
            sliding_windows=family.sliding_windows(config, layers),
            qkv_bias=family.has_qkv_bias(config),
            o_bias=family.has_o_bias(config),
            mlp_bias=flag(config, "mlp_bias"),
            qk_norm=family.has_qk_norm,
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
