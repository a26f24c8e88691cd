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
from tests.checkpoints import ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3, ROPE_YARN, TinyLlama, write_random_model

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
    model = TinyLlama(rope=rope)
    new = ModelConfig.load(write_random_model(tmp_path / "5", model))
    old = ModelConfig.load(write_random_model(tmp_path / "4", model, transformers_4_config=True))
    assert "rope_scaling" in json.loads((tmp_path / "4" / "config.json").read_text())
    assert new == old
    assert new.rope.type is RopeType(rope["rope_type"])
    assert new.rope.theta == rope["rope_theta"]
    assert new.rope.factor == rope.get("factor", 1.0)


def test_a_written_model_reads_back(tmp_path: Path) -> None:
    model = TinyLlama(hidden_size=96, heads=6, kv_heads=3, tied=True, eos_token_id=(7, 9))
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
    )


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
        ({"model_type": "qwen2"}, "model_type: 'qwen2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
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
