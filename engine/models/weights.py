"""A Llama checkpoint's weights, read from safetensors into merged matrices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segue.engine.models.config import ModelConfig, ModelError

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer layer. Matrices are [out, in]: ``qkv`` is [q | k | v] by rows, ``gate_up`` [gate | up]."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_attention_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaWeights:
    """A whole model. ``embedding`` and ``head`` are [vocab, hidden], the same tensor when the model ties them."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def load_weights(
    model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LlamaWeights:
    """Read the checkpoint's safetensors files, one or many, converted to ``dtype``.

    Tensors are copied one by one into the merged matrices, so that no second copy of the model is held. Raises
    ModelError, naming the file or tensor, for what is missing, unexpected, of the wrong shape or unreadable.
    """
    weights = _allocate(config, dtype, device)
    destinations = _destinations(config, weights)
    wanted = set(destinations)
    for path, names in _files(model_dir):
        _load_file(path, names, config, destinations)
        wanted -= names
    if wanted:
        raise ModelError(f"{model_dir}: tensor {min(wanted)} is missing ({len(wanted)} in all)")
    return weights


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> LlamaWeights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    embedding = empty(config.vocab_size, hidden)
    return LlamaWeights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                input_norm=empty(hidden),
                qkv=empty(query + 2 * key, hidden),
                o=empty(hidden, query),
                post_attention_norm=empty(hidden),
                gate_up=empty(2 * inner, hidden),
                down=empty(hidden, inner),
            )
            for _ in range(config.layers)
        ),
        norm=empty(hidden),
        head=embedding if config.tied_embeddings else empty(config.vocab_size, hidden),
    )


def _destinations(config: ModelConfig, weights: LlamaWeights) -> Mapping[str, Tensor]:
    """Where each tensor of the checkpoint goes: views of the merged matrices, by the checkpoint's names."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    destinations = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        destinations["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        q, k, v = torch.split(layer.qkv, [query, key, key])
        gate, up = layer.gate_up.chunk(2)
        names = {
            "input_layernorm": layer.input_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.o,
            "post_attention_layernorm": layer.post_attention_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down,
        }
        destinations |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in names.items()}
    return destinations


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Old checkpoints store rotary frequencies, and some a tied head a second time; both are derived here."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings)


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


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
