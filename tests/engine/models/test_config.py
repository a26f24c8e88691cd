"""Reading config.json: both spellings of rope, defaults, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from segue.engine.lora.manifest import Projection
from segue.engine.models.config import ModelConfig, ModelError, RopeConfig, RopeType, UnsupportedModelError
from tests.checkpoints import ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, TinyModel, write_random_model

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "rope", [ROPE_DEFAULT, ROPE_LINEAR, ROPE_YARN, ROPE_LLAMA3], ids=lambda rope: rope["rope_type"]
)
def test_both_spellings_of_rope_read_alike(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = TinyModel(rope=rope)
    new = ModelConfig.load(write_random_model(tmp_path / "5", model))
    old = ModelConfig.load(write_random_model(tmp_path / "4", model, transformers_4_config=True))
    assert "rope_scaling" in json.loads((tmp_path / "4" / "config.json").read_text())
    assert new == old
    assert new.rope.type is RopeType(rope["rope_type"])
    assert new.rope.theta == rope["rope_theta"]
    assert new.rope.factor == rope.get("factor", 1.0)


def test_a_written_model_reads_back(tmp_path: Path) -> None:
    model = TinyModel(hidden_size=96, heads=6, kv_heads=3, tied=True, eos_token_id=(7, 9))
    config = ModelConfig.load(write_random_model(tmp_path, model))
    assert config == ModelConfig(
        hidden_size=96,
        layers=3,
        heads=6,
        kv_heads=3,
        head_dim=16,
        intermediate_size=96,
        vocab_size=256,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tied_embeddings=True,
        eos_token_ids=(7, 9),
        dtype="float32",
        rope=RopeConfig(),
        sliding_windows=(None, None, None),
    )


@pytest.mark.parametrize(
    ("family", "extra", "expected"),
    [
        ("llama", {}, {}),
        ("llama", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
        ("mistral", {"sliding_window": None}, {}),
        ("mistral", {"sliding_window": 24}, {"sliding_windows": (24, 24, 24)}),
        ("mistral", {}, {"sliding_windows": (4096, 4096, 4096)}),
        ("qwen2", {}, {"qkv_bias": True}),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": False}, {"qkv_bias": True}),
        (
            "qwen2",
            {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
            {"qkv_bias": True, "sliding_windows": (None, 24, 24)},
        ),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 28}, {"qkv_bias": True}),
        ("qwen3", {}, {"qk_norm": True}),
        ("qwen3", {"attention_bias": True}, {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
        (
            "qwen3",
            {
                "sliding_window": 24,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            {"qk_norm": True, "sliding_windows": (24, None, 24)},
        ),
    ],
)
def test_differences_of_the_families(
    tmp_path: Path, family: str, extra: dict[str, Any], expected: dict[str, Any]
) -> None:
    plain = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "sliding_windows": (None,) * 3}
    config = ModelConfig.load(write_random_model(tmp_path, TinyModel(family=family, extra=extra)))
    assert {key: getattr(config, key) for key in plain} == plain | expected


def test_projection_shapes() -> None:
    shapes = ModelConfig.from_json(BASE | {"head_dim": 32}, {}).projection_shapes()
    assert list(shapes) == list(Projection)
    assert shapes[Projection.Q] == (96, 192)
    assert shapes[Projection.K] == shapes[Projection.V] == (96, 96)
    assert shapes[Projection.O] == (192, 96)
    assert shapes[Projection.GATE] == shapes[Projection.UP] == (96, 128)
    assert shapes[Projection.DOWN] == (128, 96)


def test_absent_keys_take_llamas_defaults() -> None:
    config = ModelConfig.from_json({key: value for key, value in BASE.items() if key != "num_key_value_heads"}, {})
    assert (config.kv_heads, config.head_dim, config.rms_norm_eps) == (6, 16, 1e-6)
    assert not config.tied_embeddings
    assert config.eos_token_ids == ()
    assert config.dtype == "float32"
    assert config.rope == RopeConfig(type=RopeType.DEFAULT, theta=10_000.0)


@pytest.mark.parametrize(
    ("family", "head_dim", "windows"),
    [("mistral", 16, (4096, 4096)), ("qwen2", 16, (None, None)), ("qwen3", 128, (None, None))],
)
def test_absent_keys_take_the_familys_defaults(family: str, head_dim: int, windows: tuple[int | None, ...]) -> None:
    config = ModelConfig.from_json(BASE | {"model_type": family}, {})
    assert (config.head_dim, config.sliding_windows) == (head_dim, windows)


PUBLISHED: dict[str, dict[str, Any]] = {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    """Spelled as on the hub: every key of theirs is either understood or without effect."""
    published = PUBLISHED[name]
    config = ModelConfig.from_json(published, {"eos_token_id": [151645, 151643]})
    window = 4096 if name.startswith("Mistral") else None
    assert config.sliding_windows == (window,) * config.layers
    assert config.head_dim == 128
    assert config.qkv_bias == name.startswith("Qwen2")
    assert config.qk_norm == name.startswith("Qwen3")
    assert not config.o_bias
    assert config.rope == RopeConfig(theta=published["rope_theta"])
    assert config.eos_token_ids == (151645, 151643)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"quantization_config": None, "num_experts": 0, "pruned_heads": {}, "final_logit_softcapping": None},
        {"is_causal": True, "attention_multiplier": 1.0, "auto_map": {}, "architectures": None},
        {"architectures": ["LLaMAForCausalLM"], "auto_map": {"AutoTokenizer": "t.T"}},
        {"vocabulary": "of no known effect", "use_cache": True, "attention_dropout": 0.1, "pretraining_tp": 2},
    ],
)
def test_fields_that_are_off_or_without_effect_change_nothing(change: dict[str, Any]) -> None:
    assert ModelConfig.from_json(BASE | change, {}) == ModelConfig.from_json(BASE, {})


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [2, 3]}, {}, (2, 3)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6, 7]}, (5, 6, 7)),
        ({"eos_token_id": 2}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": 0}, {}, (0,)),
    ],
)
def test_end_of_sequence_tokens(config: dict[str, Any], generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert ModelConfig.from_json(BASE | config, generation).eos_token_ids == expected


def test_legacy_type_key_and_outer_pretraining_length() -> None:
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 100}
    config = ModelConfig.from_json(BASE | {"rope_scaling": scaling, "original_max_position_embeddings": 64}, {})
    assert config.rope.type is RopeType.YARN
    assert config.rope.original_max_position_embeddings == 64
    assert config.rope.factor == 512 / 64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2_moe"}, "model_type: 'qwen2_moe'"),
        ({"model_type": "mixtral"}, "model_type: 'mixtral'"),
        ({"model_type": "gemma2"}, "model_type: 'gemma2'"),
        ({"model_type": None}, "model_type: None"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"is_causal": False}, "is_causal"),
        ({"qk_norm": True}, "qk_norm"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: LlamaForSequenceClassification"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: 'linear_attention'"),
        (
            {"model_type": "mistral", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type: 'longrope'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type: 'proportional'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_models_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as raised:
        ModelConfig.from_json(BASE | change, {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": ["2"]}, "eos_token_id"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        ({"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_parameters"),
        ({"rope_scaling": {**ROPE_LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ],
)
def test_broken_values_are_refused_by_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=f"^{named}: "):
        ModelConfig.from_json(BASE | change, {})


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", None])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_importing_the_configuration_does_not_import_torch() -> None:
    code = "import sys, segue.engine.models.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
