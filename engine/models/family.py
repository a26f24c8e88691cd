"""The families of models that are served: what each has beyond a plain decoder, and what is refused by name.

Transformers ignores fields that a family's class does not read. Here a field that asks for another model than the one
that would be computed is an error, so that no checkpoint is served wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

from segue.engine.models.fields import ModelError, UnsupportedModelError, flag, non_negative_int, positive_int


class Family(Enum):
    """The supported architectures, by the names that ``model_type`` uses."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Family:
        """The family of a parsed config.json.

        Raises UnsupportedModelError for another one, and for every field that changes the result and is not served.
        """
        name = config.get("model_type")
        known = [family.value for family in cls]
        if name not in known:
            raise UnsupportedModelError(f"model_type: {name!r} is not supported; supported are {', '.join(known)}")
        family = cls(name)
        _refuse_unsupported(config, family)
        return family

    @property
    def default_head_dim(self) -> int | None:
        """What an absent ``head_dim`` means; None for hidden_size / num_attention_heads."""
        return 128 if self is Family.QWEN3 else None

    @property
    def has_qk_norm(self) -> bool:
        """Whether each head's query and key are normed before they are rotated."""
        return self is Family.QWEN3

    def has_qkv_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether the query, key and value projections have biases. Raises ModelError."""
        return self is Family.QWEN2 or flag(config, "attention_bias")

    def has_o_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether the projection behind attention has a bias. Raises ModelError."""
        return self is not Family.QWEN2 and flag(config, "attention_bias")

    def sliding_windows(self, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Each layer's window in tokens, None for a layer that sees all. Raises ModelError.

        A row at position p of a layer with window w sees the keys p - w + 1 to p.
        """
        window = _window(config, self)
        first = 0
        if self in (Family.QWEN2, Family.QWEN3):
            first = non_negative_int(config, "max_window_layers", 28)
        expected = tuple(window if layer >= first else None for layer in range(layers))
        layer_types = config.get("layer_types")
        if layer_types is None:
            return expected
        windows = _windows_of_types(layer_types, window, layers)
        # Transformers lets these two families read sliding_window alone and takes layer_types for the cache only.
        if self in (Family.LLAMA, Family.MISTRAL) and windows != expected:
            raise UnsupportedModelError(f"layer_types: differing layers are not supported in {self.value} models")
        return windows


# What makes a model another one than its family's whenever it is there and neither null, false, 0 nor empty.
_MUST_BE_OFF: Mapping[str, str] = MappingProxyType(
    {
        "quantization_config": "quantised checkpoints are",
        "compression_config": "quantised checkpoints are",
        "num_experts": "mixtures of experts are",
        "num_local_experts": "mixtures of experts are",
        "n_routed_experts": "mixtures of experts are",
        "attn_logit_softcapping": "soft-capping of logits is",
        "final_logit_softcapping": "soft-capping of logits is",
        "query_pre_attn_scalar": "another scale of attention scores is",
        "clip_qkv": "clipping of queries, keys and values is",
        "attention_chunk_size": "attention in chunks is",
        "dual_chunk_attention_config": "attention in chunks is",
        "use_bidirectional_attention": "attention to later tokens is",
        "no_rope_layers": "leaving out rotary embeddings in some layers is",
        "no_rope_layer_interval": "leaving out rotary embeddings in some layers is",
        "use_mrope": "multimodal rotary embeddings are",
        "per_layer_config": "layers of different shapes are",
        "pruned_heads": "layers of different shapes are",
        "is_encoder_decoder": "models with an encoder are",
        "add_cross_attention": "models with an encoder are",
        "vision_config": "multimodal models are",
        "audio_config": "multimodal models are",
    }
)
_MUST_BE_ONE = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
_QK_NORM_KEYS = ("qk_norm", "use_qk_norm", "qk_layernorm")
# The fields by which a family says that it has biases. A Qwen2 model has those of q, k and v in any case.
_BIAS_KEYS: Mapping[Family, tuple[str, ...]] = MappingProxyType(
    {
        Family.LLAMA: ("attention_bias", "mlp_bias"),
        Family.MISTRAL: (),
        Family.QWEN2: ("attention_bias",),
        Family.QWEN3: ("attention_bias",),
    }
)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    given = config.get("sliding_window", 4096)
    match family:
        case Family.LLAMA:
            if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
                raise UnsupportedModelError("sliding_window: is not supported in llama models")
            return None
        case Family.MISTRAL:
            return None if given is None else positive_int(config, "sliding_window", 4096)
        case Family.QWEN2 | Family.QWEN3:
            if given is None or not flag(config, "use_sliding_window"):
                return None
            return positive_int(config, "sliding_window", 4096)


def _windows_of_types(layer_types: Any, window: int | None, layers: int) -> tuple[int | None, ...]:
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise ModelError(f"layer_types: must be a list with one entry for each of {layers} layers")
    for name in layer_types:
        if name not in (_FULL, _SLIDING):
            raise UnsupportedModelError(f"layer_types: {name!r} is not supported; supported are {_FULL}, {_SLIDING}")
        if name == _SLIDING and window is None:
            raise ModelError(f"layer_types: has {_SLIDING}, but no sliding_window is in use")
    return tuple(window if name == _SLIDING else None for name in layer_types)


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"hidden_act: {config['hidden_act']!r} is not supported; supported is 'silu'")
    for key, what in _MUST_BE_OFF.items():
        if config.get(key):
            raise UnsupportedModelError(f"{key}: {what} not supported")
    for key in _MUST_BE_ONE:
        if config.get(key) not in (None, 1):
            raise UnsupportedModelError(f"{key}: must be 1, is {config[key]!r}; scaled models are not supported")
    if config.get("is_causal") is False:
        raise UnsupportedModelError("is_causal: attention to later tokens is not supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and key not in _BIAS_KEYS[family]:
            raise UnsupportedModelError(f"{key}: is not supported in {family.value} models")
    for key in _QK_NORM_KEYS:
        if config.get(key) and not family.has_qk_norm:
            raise UnsupportedModelError(f"{key}: norms of queries and keys are not supported in {family.value} models")
    _refuse_other_classes(config, family)


def _refuse_other_classes(config: Mapping[str, Any], family: Family) -> None:
    """Classifiers, encoders and models with code of their own have the family's model_type too."""
    expected = f"{family.value}forcausallm"
    architectures = config.get("architectures")
    if architectures and expected not in [str(name).lower() for name in architectures]:
        raise UnsupportedModelError(f"architectures: {', '.join(map(str, architectures))} is not supported")
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        raise UnsupportedModelError("auto_map: models with code of their own are not supported")
