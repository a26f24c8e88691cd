"""Random checkpoints on disk: models in the layout of transformers and LoRA adapters in that of PEFT.

Weights are scaled so that every layer keeps the spread of its input, so nothing overflows in 16 bits at any depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from segue.bench.shapes import ModelShape
from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import module_path
from segue.engine.models.config import ModelConfig

_SHARD_BYTES = 256 << 20
# What an adapter's delta adds to a module's output, as a part of that output's own spread.
_DELTA_STRENGTH = 0.4


class Targets(StrEnum):
    """The projections that a random adapter has weights for."""

    QKVO = "qkvo"
    ALL = "all"


TARGET_PROJECTIONS: Mapping[Targets, tuple[Projection, ...]] = MappingProxyType(
    {
        Targets.QKVO: (Projection.Q, Projection.K, Projection.V, Projection.O),
        Targets.ALL: tuple(Projection),
    }
)


def write_random_model(directory: Path, shape: ModelShape, *, dtype: torch.dtype, seed: int = 0) -> Path:
    """Write config.json and safetensors shards with an index into ``directory`` (created) and return it.

    At most one shard, of 256 MiB or a single tensor, is held in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype_name = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(shape.config_json(dtype_name), indent=2))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(_shards(_random_tensors(shape, dtype, seed)), start=1):
        file_name = f"model-{number:05}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def write_random_adapter(
    directory: Path, model: ModelConfig, *, rank: int, targets: Targets, dtype: torch.dtype, seed: int = 0
) -> Path:
    """Write a LoRA adapter of ``rank`` with alpha 2 x rank into ``directory`` (created) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    projections, shapes = TARGET_PROJECTIONS[targets], model.projection_shapes()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.layers):
        for projection in projections:
            in_features, out_features = shapes[projection]
            name = f"base_model.model.{module_path(layer, projection)}"
            # The scale is alpha / rank = 2, and a sum over the rank has rank^0.5 times the spread of its terms.
            spread = _DELTA_STRENGTH / (2 * rank**0.5)
            tensors[f"{name}.lora_A.weight"] = _noise((rank, in_features), in_features**-0.5, dtype, generator)
            tensors[f"{name}.lora_B.weight"] = _noise((out_features, rank), spread, dtype, generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": [projection.value for projection in projections],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def _random_tensors(shape: ModelShape, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by transformers' name, made when it is asked for."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", _noise((shape.vocab_size, hidden), 1.0, dtype, generator)
    for layer in range(shape.layers):
        for name, (out_features, in_features) in linears.items():
            weight = _noise((out_features, in_features), in_features**-0.5, dtype, generator)
            yield f"model.layers.{layer}.{name}.weight", weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", torch.ones(hidden, dtype=dtype)
    yield "model.norm.weight", torch.ones(hidden, dtype=dtype)
    yield "lm_head.weight", _noise((shape.vocab_size, hidden), 2.0 * hidden**-0.5, dtype, generator)


def _noise(size: tuple[int, int], spread: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(size, dtype=dtype).normal_(0.0, spread, generator=generator)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held_bytes = 0
    for name, tensor in tensors:
        if shard and held_bytes + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, held_bytes = {}, 0
        shard[name] = tensor
        held_bytes += tensor.nbytes
    yield shard
