"""A checkpoint's weights, read from safetensors into merged matrices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segue.engine.models.config import ModelConfig
from segue.engine.models.fields import ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer: ``weight`` is [out, in], ``bias`` [out] or None for a model without."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer. ``qkv`` is [q | k | v] by rows, ``gate_up`` [gate | up].

    ``q_norm`` and ``k_norm`` [head_dim] serve every head alike; both are None in a model without.
    """

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """A whole model. ``embedding`` and ``head`` are [vocab, hidden], the same tensor when the model ties them."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def load_weights(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ModelWeights:
    """Read the checkpoint's safetensors files, one or many, converted to ``dtype``.

    Tensors are copied one by one into the merged matrices, so that no second copy of the model is held. Raises
    ModelError, naming the file or tensor, for what is missing, unexpected, of the wrong shape or unreadable.
    """
    weights = _allocate(config, dtype, device)
    destinations = _destinations(config, weights)
    wanted = set(destinations)
    files = tuple(_files(model_dir))
    for path, names in files:
        _load_file(path, names, config, destinations)
        wanted -= names
    if wanted:
        raise ModelError(f"{model_dir}: tensor {min(wanted)} is missing ({len(wanted)} in all)")
    if config.tied_embeddings:
        _check_tied_head([path for path, names in files if _HEAD in names], weights.embedding)
    return weights


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> ModelWeights:
    """Weights of the model's shape that keep the scale of what goes through them; for benchmarks."""
    weights = _allocate(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in _destinations(config, weights).items():
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 1.0 if "embed" in name else tensor.shape[-1] ** -0.5, generator=generator)
    return weights


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> ModelWeights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(out_features: int, in_features: int, has_bias: bool) -> Linear:
        return Linear(weight=empty(out_features, in_features), bias=empty(out_features) if has_bias else None)

    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    embedding = empty(config.vocab_size, hidden)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                input_norm=empty(hidden),
                qkv=linear(query + 2 * key, hidden, config.qkv_bias),
                q_norm=empty(config.head_dim) if config.qk_norm else None,
                k_norm=empty(config.head_dim) if config.qk_norm else None,
                o=linear(hidden, query, config.o_bias),
                post_attention_norm=empty(hidden),
                gate_up=linear(2 * inner, hidden, config.mlp_bias),
                down=linear(hidden, inner, config.mlp_bias),
            )
            for _ in range(config.layers)
        ),
        norm=empty(hidden),
        head=embedding if config.tied_embeddings else empty(config.vocab_size, hidden),
    )


def _destinations(config: ModelConfig, weights: ModelWeights) -> Mapping[str, Tensor]:
    """Where each tensor of the checkpoint goes: views of the merged matrices, by the checkpoint's names."""
    query, key, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    destinations = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        destinations[_HEAD] = weights.head
    for index, layer in enumerate(weights.layers):
        norms = {
            "input_layernorm": layer.input_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
            "post_attention_layernorm": layer.post_attention_norm,
        }
        named = {f"{name}.weight": tensor for name, tensor in norms.items() if tensor is not None}
        named |= _parts(layer.qkv, {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key})
        named |= _parts(layer.o, {"self_attn.o_proj": config.hidden_size})
        named |= _parts(layer.gate_up, {"mlp.gate_proj": inner, "mlp.up_proj": inner})
        named |= _parts(layer.down, {"mlp.down_proj": config.hidden_size})
        destinations |= {f"model.layers.{index}.{name}": tensor for name, tensor in named.items()}
    return destinations


def _parts(merged: Linear, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The views of a merged layer that hold its parts, which are ``widths`` wide and lie in that order."""
    names, rows = list(widths), list(widths.values())
    parts = {f"{name}.weight": part for name, part in zip(names, torch.split(merged.weight, rows), strict=True)}
    if merged.bias is not None:
        parts |= {f"{name}.bias": part for name, part in zip(names, torch.split(merged.bias, rows), strict=True)}
    return parts


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Old checkpoints store rotary frequencies, and some a tied head a second time; both are derived here."""
    return name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and config.tied_embeddings)


def _files(model_dir: Path) -> Iterator[tuple[Path, set[str]]]:
    """The checkpoint's files and the tensors to take from each."""
    single, index = model_dir / _SINGLE_FILE, model_dir / _INDEX_FILE
    if single.exists():
        with _opened(single) as file:
            names = set(file.keys())
        yield single, names
        return
    if not index.exists():
        raise ModelError(f"{model_dir}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}; other formats are not read")
    by_file: dict[str, set[str]] = {}
    for name, file_name in _weight_map(index).items():
        by_file.setdefault(file_name, set()).add(name)
    for file_name, names in sorted(by_file.items()):
        yield model_dir / file_name, names


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = {str(name): str(file_name) for name, file_name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index with a weight_map: {error}") from error
    for file_name in pairs.values():
        if Path(file_name).name != file_name:
            raise ModelError(f"{index}: weight_map names {file_name!r}, which is not a file beside it")
    return pairs


def _load_file(path: Path, names: set[str], config: ModelConfig, destinations: Mapping[str, Tensor]) -> None:
    with _opened(path) as file:
        present = set(file.keys())
        for name in sorted(names):
            if name not in present:
                raise ModelError(f"{path}: tensor {name} is missing")
            if name in destinations:
                _load_tensor(file, path, name, destinations[name])
            elif not _is_redundant(name, config):
                raise ModelError(f"{path}: tensor {name} is not expected")


def _load_tensor(file: Any, path: Path, name: str, destination: Tensor) -> None:
    stored = file.get_slice(name)
    shape, expected = tuple(stored.get_shape()), tuple(destination.shape)
    if shape != expected:
        raise ModelError(f"{path}: tensor {name} has shape {list(shape)}, expected {list(expected)}")
    if stored.get_dtype() not in _FLOAT_DTYPES:
        raise ModelError(f"{path}: tensor {name} has dtype {stored.get_dtype()}, expected {', '.join(_FLOAT_DTYPES)}")
    destination.copy_(file.get_tensor(name))


def _check_tied_head(paths: Sequence[Path], embedding: Tensor) -> None:
    """A second copy of a tied head must say the same: transformers 4 would ignore another one, 5 would use it."""
    for path in paths:
        with _opened(path) as file:
            if not torch.equal(file.get_tensor(_HEAD).to(embedding), embedding):
                raise ModelError(f"{path}: tensor {_HEAD} is not the embedding, to which tie_word_embeddings ties it")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
