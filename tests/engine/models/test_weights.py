"""Reading checkpoints: sharded, tied, of another dtype, and what is wrong with broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from segue.engine.models.config import ModelConfig, ModelError
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.weights import ModelWeights, load_weights, random_weights
from tests.checkpoints import TinyModel, write_random_model
from tests.engine.models.passes import Runner, make_runner


def load(model_dir: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(model_dir, ModelConfig.load(model_dir), dtype)


def rewrite(model_dir: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_merged_matrices_hold_their_parts_in_order(tmp_path: Path) -> None:
    weights = load(write_random_model(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.head, tensors["lm_head.weight"])
    assert torch.equal(weights.norm, tensors["model.norm.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        attention = [tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
        assert torch.equal(layer.qkv.weight, torch.cat(attention))
        assert torch.equal(layer.o.weight, tensors[f"{prefix}.self_attn.o_proj.weight"])
        mlp = [tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(layer.gate_up.weight, torch.cat(mlp))
        assert torch.equal(layer.down.weight, tensors[f"{prefix}.mlp.down_proj.weight"])
        assert torch.equal(layer.input_norm, tensors[f"{prefix}.input_layernorm.weight"])
        assert torch.equal(layer.post_attention_norm, tensors[f"{prefix}.post_attention_layernorm.weight"])


def test_sharded_checkpoint_reads_like_a_single_file(tmp_path: Path) -> None:
    single = load(write_random_model(tmp_path / "single"))
    sharded_dir = write_random_model(tmp_path / "sharded", max_shard_bytes=60_000)
    assert len(list(sharded_dir.glob("model-*.safetensors"))) > 3
    sharded = load(sharded_dir)
    assert torch.equal(single.embedding, sharded.embedding)
    for one, other in zip(single.layers, sharded.layers, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight)
        assert torch.equal(one.gate_up.weight, other.gate_up.weight)


def test_weights_are_converted(tmp_path: Path) -> None:
    weights = load(write_random_model(tmp_path, dtype=torch.float16), torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert stored.dtype == torch.float16
    assert torch.equal(weights.layers[1].down.weight, stored.to(torch.bfloat16))


@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_slices_are_converted_from_any_dtype_to_any(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    model_dir = write_random_model(tmp_path, TinyModel(layers=1), dtype=stored)
    weights = load(model_dir, wanted)
    tensors = load_file(model_dir / "model.safetensors")
    parts = [tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    assert parts[0].dtype is stored
    assert torch.equal(weights.layers[0].qkv.weight, torch.cat(parts).to(wanted))
    assert torch.equal(weights.head, tensors["lm_head.weight"].to(wanted))


@pytest.mark.parametrize("second_head", [False, True])
def test_progress_grows_from_nothing_to_all_bytes(tmp_path: Path, second_head: bool) -> None:
    write_random_model(tmp_path, TinyModel(tied=True), dtype=torch.bfloat16)
    if second_head:
        head = {"lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()}
        rewrite(tmp_path, lambda tensors: tensors.update(head))
    reports: list[tuple[int, int]] = []
    load_weights(
        tmp_path, ModelConfig.load(tmp_path), torch.float32, report=lambda done, total: reports.append((done, total))
    )
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert all(one[0] < other[0] and other[1] == total for one, other in pairwise(reports))


def test_random_weights_keep_activations_finite_and_tell_how_far_they_are(tmp_path: Path) -> None:
    config = ModelConfig.load(write_random_model(tmp_path, TinyModel(layers=8, family="qwen2")))
    reports: list[tuple[int, int]] = []
    weights = random_weights(config, torch.float16, report=lambda done, total: reports.append((done, total)))
    assert reports[0][0] == 0
    assert reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert bool((weights.norm == 1).all())
    spread = float(weights.layers[3].down.weight.float().std())
    assert spread == pytest.approx(config.intermediate_size**-0.5, rel=0.1)
    again = random_weights(config, torch.float16)
    assert torch.equal(again.layers[7].qkv.weight, weights.layers[7].qkv.weight)
    runner = Runner(DecoderModel(config, weights), make_runner(tmp_path, dtype=torch.float16).pool)
    logits = runner.run([(runner.add(range(3, 103), 100), 100, 100)])
    assert bool(logits.isfinite().all())
    assert 0.5 < float(logits.std()) < 20


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    weights = load(write_random_model(tmp_path, TinyModel(tied=True)))
    assert weights.head is weights.embedding
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_what_old_checkpoints_store_besides_is_skipped(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(write_random_model(tmp_path, TinyModel(tied=True)), change)
    assert load(tmp_path).layers[0].qkv.weight.isfinite().all()


def test_second_copy_of_a_tied_head_must_agree(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite(write_random_model(tmp_path, TinyModel(tied=True)), change)
    with pytest.raises(ModelError, match=r"lm_head\.weight is not the embedding"):
        load(tmp_path)


def test_biases_and_head_norms_are_read(tmp_path: Path) -> None:
    model = TinyModel(family="qwen3", extra={"attention_bias": True})
    weights = load(write_random_model(tmp_path, model, max_shard_bytes=60_000))
    tensors: dict[str, Tensor] = {}
    for file in tmp_path.glob("model-*.safetensors"):
        tensors |= load_file(file)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}.self_attn"
        biases = [tensors[f"{prefix}.{name}_proj.bias"] for name in ("q", "k", "v")]
        assert layer.qkv.bias is not None
        assert layer.o.bias is not None
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        assert torch.equal(layer.qkv.bias, torch.cat(biases))
        assert torch.equal(layer.o.bias, tensors[f"{prefix}.o_proj.bias"])
        assert torch.equal(layer.q_norm, tensors[f"{prefix}.q_norm.weight"])
        assert torch.equal(layer.k_norm, tensors[f"{prefix}.k_norm.weight"])
        assert layer.gate_up.bias is None
        assert layer.down.bias is None


def test_mlp_biases_are_read(tmp_path: Path) -> None:
    weights = load(write_random_model(tmp_path, TinyModel(extra={"mlp_bias": True})))
    tensors = load_file(tmp_path / "model.safetensors")
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}.mlp"
        assert layer.gate_up.bias is not None
        assert layer.down.bias is not None
        gate_up = torch.cat([tensors[f"{prefix}.gate_proj.bias"], tensors[f"{prefix}.up_proj.bias"]])
        assert torch.equal(layer.gate_up.bias, gate_up)
        assert torch.equal(layer.down.bias, tensors[f"{prefix}.down_proj.bias"])
        assert layer.qkv.bias is None


@pytest.mark.parametrize("name", ["self_attn.k_proj.bias", "self_attn.q_norm.weight"])
def test_missing_bias_or_head_norm_is_named(tmp_path: Path, name: str) -> None:
    family = "qwen2" if "bias" in name else "qwen3"
    name = f"model.layers.1.{name}"
    rewrite(write_random_model(tmp_path, TinyModel(family=family)), lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(write_random_model(tmp_path), lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load(tmp_path)


def test_head_of_an_untied_model_must_be_there(tmp_path: Path) -> None:
    rewrite(write_random_model(tmp_path), lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        load(tmp_path)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(write_random_model(tmp_path), lambda tensors: tensors.__setitem__(name, torch.ones(64)))
    with pytest.raises(ModelError, match=f"{name} is not expected"):
        load(tmp_path)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(write_random_model(tmp_path), lambda tensors: tensors.__setitem__(name, torch.ones(64, 64)))
    with pytest.raises(ModelError, match=rf"{name} has shape \[64, 64\], expected \[32, 64\]"):
        load(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    ones = torch.ones(32, 64, dtype=torch.int8)
    rewrite(write_random_model(tmp_path), lambda tensors: tensors.__setitem__(name, ones))
    with pytest.raises(ModelError, match=f"{name} has dtype I8"):
        load(tmp_path)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_random_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: is not a readable safetensors file"):
        load(tmp_path)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (write_random_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_random_model(tmp_path, max_shard_bytes=60_000)


def test_missing_shard_is_named(sharded: Path) -> None:
    next(sharded.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-\d+\.safetensors"):
        load(sharded)


def test_index_that_names_an_absent_tensor_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    name = "model.norm.weight"
    other = next(file for file in files if file != content["weight_map"][name])
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"{other}: tensor {name} is missing"):
        load(sharded)


def test_truncated_shard_is_named(sharded: Path) -> None:
    path = next(sharded.glob("model-00003-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{path.name}: is not a readable safetensors file"):
        load(sharded)


def test_tensors_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing \(1 in all\)"):
        load(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        load(sharded)
