"""Shapes of models to measure. A benchmark needs a model's sizes, not its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_PLAIN_ROPE: Mapping[str, Any] = MappingProxyType({"rope_type": "default", "rope_theta": 10_000.0})
_LLAMA_3_1_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Llama model's sizes: widths in features, ``max_position_embeddings`` in tokens; the head is not tied.

    ``rope`` is config.json's ``rope_parameters``.
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 4096
    rope: Mapping[str, Any] = field(default_factory=lambda: _PLAIN_ROPE)

    def config_json(self, dtype: str) -> dict[str, Any]:
        """A config.json as transformers 5 writes it, for weights in ``dtype`` (torch's name)."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": dtype,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": dict(self.rope),
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "tiny": ModelShape(
            hidden_size=256, intermediate_size=704, layers=4, heads=4, kv_heads=2, head_dim=64, vocab_size=1024
        ),
        "small": ModelShape(
            hidden_size=512, intermediate_size=1408, layers=8, heads=8, kv_heads=2, head_dim=64, vocab_size=8192
        ),
        "medium": ModelShape(
            hidden_size=1024, intermediate_size=2816, layers=8, heads=16, kv_heads=4, head_dim=64, vocab_size=16384
        ),
        "llama-2-7b": ModelShape(
            hidden_size=4096,
            intermediate_size=11008,
            layers=32,
            heads=32,
            kv_heads=32,
            head_dim=128,
            vocab_size=32000,
        ),
        "llama-3.1-8b": ModelShape(
            hidden_size=4096,
            intermediate_size=14336,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            max_position_embeddings=131072,
            rope=_LLAMA_3_1_ROPE,
        ),
    }
)
