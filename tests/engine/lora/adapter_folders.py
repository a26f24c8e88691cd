"""Adapter folders on disk for tests: small, quick to write, and easy to spoil."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from segue.engine.lora.manifest import Projection
from segue.engine.lora.module_match import module_path

ATTENTION = (Projection.Q, Projection.K, Projection.V, Projection.O)
DEFAULT_RANK = 4


@dataclass(frozen=True, kw_only=True)
class SmallModel:
    """The shapes of a base model that exists only as shapes."""

    layers: int = 3
    hidden: int = 32
    kv: int = 16
    mlp: int = 48

    def projection_shapes(self) -> Mapping[Projection, tuple[int, int]]:
        return {
            Projection.Q: (self.hidden, self.hidden),
            Projection.K: (self.hidden, self.kv),
            Projection.V: (self.hidden, self.kv),
            Projection.O: (self.hidden, self.hidden),
            Projection.GATE: (self.hidden, self.mlp),
            Projection.UP: (self.hidden, self.mlp),
            Projection.DOWN: (self.mlp, self.hidden),
        }


MODEL = SmallModel()


def tensor_name(layer: int, projection: Projection, matrix: str) -> str:
    """PEFT's name of a LoRA matrix, ``matrix`` being A or B."""
    return f"base_model.model.{module_path(layer, projection)}.lora_{matrix}.weight"


def random_tensors(
    model: SmallModel = MODEL,
    *,
    rank: int = DEFAULT_RANK,
    ranks: Mapping[Projection, int] | None = None,
    targets: Iterable[Projection] = ATTENTION,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """An adapter's matrices by PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(model.layers):
        for projection in targets:
            in_features, out_features = model.projection_shapes()[projection]
            own_rank = (ranks or {}).get(projection, rank)
            a = torch.randn(own_rank, in_features, generator=generator)
            b = torch.randn(out_features, own_rank, generator=generator)
            tensors[tensor_name(layer, projection, "A")] = a.to(dtype)
            tensors[tensor_name(layer, projection, "B")] = b.to(dtype)
    return tensors


def peft_config(targets: Iterable[Projection] = ATTENTION, **options: Any) -> dict[str, Any]:
    """A plain LoRA configuration; ``options`` add to it or replace parts of it."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": DEFAULT_RANK,
        "lora_alpha": 8,
        "target_modules": [projection.value for projection in targets],
        "bias": "none",
    }
    return {**config, **options}


def write_folder(
    folder: Path, *, tensors: Mapping[str, Tensor] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """Write an adapter folder, by default a sound one for MODEL."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(random_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(peft_config() if config is None else config))
    return folder


def write_raw_weights(folder: Path, header: Any, data: bytes = b"") -> Path:
    """Replace the folder's weights by a safetensors file with this header (an object, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder
