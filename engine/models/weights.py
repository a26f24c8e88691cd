"""A model's weights in merged matrices: a checkpoint's, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from segue.engine.models.checkpoint_files import FLOAT_DTYPES, StoredTensor, stored_tensors
from segue.engine.models.config import ModelConfig
from segue.engine.models.fields import ModelError
from segue.engine.models.landing import Comparison, DeviceLanding, HostLanding, Landing
from segue.engine.models.tensor_reader import CHUNK_BYTES, READERS, TensorRead, read_tensors

_HEAD = "lm_head.weight"
# Pinned buffers whose copies are under way while every reader fills another.
_BUFFERS_UNDER_WAY = 4

# Told how many bytes of how many are done; the first is 0.
ReportBytes: TypeAlias = Callable[[int, int], None]


def report_nothing(_done_bytes: int, _total_bytes: int) -> None:
    """Where nobody asked."""


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
    model_dir: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    report: ReportBytes = report_nothing,
) -> ModelWeights:
    """Read the checkpoint's safetensors files, one or many, converted to ``dtype``.

    Files are read side by side, in chunks, straight into the merged matrices: no second copy of the model is held.
    ``report`` is called on the calling thread. Raises ModelError, naming the file or tensor, for what is missing,
    unexpected, of the wrong shape or unreadable.
    """
    stored = stored_tensors(model_dir)
    weights = _allocate(config, dtype, device)
    destinations = _destinations(config, weights)
    reads = [
        _read_of(tensor, destinations[tensor.name]) for tensor in stored if _is_wanted(tensor, destinations, config)
    ]
    missing = destinations.keys() - {read.stored.name for read in reads}
    if missing:
        raise ModelError(f"{model_dir}: tensor {min(missing)} is missing ({len(missing)} in all)")
    tied = config.tied_embeddings
    second_heads = [_read_of(tensor, weights.embedding) for tensor in stored if tied and tensor.name == _HEAD]
    counter = _ByteCounter(sum(read.stored.size_bytes for read in (*reads, *second_heads)), report)
    read_tensors(reads, _landing(weights.embedding.device), counter.add)
    _check_tied_head(second_heads, counter.add)
    return weights


def random_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    report: ReportBytes = report_nothing,
) -> ModelWeights:
    """Weights of the model's shape that keep the scale of what goes through them; for benchmarks.

    They are drawn on the device, and are the same each time on the same kind of device.
    """
    weights = _allocate(config, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    destinations = _destinations(config, weights)
    counter = _ByteCounter(sum(tensor.nbytes for tensor in destinations.values()), report)
    for name, tensor in destinations.items():
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 1.0 if "embed" in name else tensor.shape[-1] ** -0.5, generator=generator)
        counter.add(tensor.nbytes)
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


def _is_wanted(tensor: StoredTensor, destinations: Mapping[str, Tensor], config: ModelConfig) -> bool:
    """Whether the model has it. Raises ModelError when it is neither the model's nor derived from what is."""
    if tensor.name in destinations:
        return True
    # Old checkpoints store rotary frequencies, and some a tied head a second time.
    if tensor.name.endswith(".rotary_emb.inv_freq") or (tensor.name == _HEAD and config.tied_embeddings):
        return False
    raise ModelError(f"{tensor.path}: tensor {tensor.name} is not expected")


def _read_of(tensor: StoredTensor, destination: Tensor) -> TensorRead:
    """Raises ModelError when the tensor has another shape, or a dtype that no weight has."""
    shape, expected = tensor.shape, tuple(destination.shape)
    if shape != expected:
        raise ModelError(f"{tensor.path}: tensor {tensor.name} has shape {list(shape)}, expected {list(expected)}")
    if tensor.dtype not in FLOAT_DTYPES:
        known = ", ".join(FLOAT_DTYPES)
        raise ModelError(f"{tensor.path}: tensor {tensor.name} has dtype {tensor.dtype}, expected {known}")
    return TensorRead(stored=tensor, destination=destination)


def _landing(device: torch.device) -> Landing:
    if device.type == "cpu":
        return HostLanding()
    return DeviceLanding(device, buffers=READERS + _BUFFERS_UNDER_WAY, buffer_bytes=CHUNK_BYTES)


def _check_tied_head(reads: Sequence[TensorRead], on_read: Callable[[int], None]) -> None:
    """A second copy of a tied head must say the same: transformers 4 would ignore another one, 5 would use it."""
    comparison = Comparison()
    read_tensors(reads, comparison, on_read)
    if comparison.differs:
        path = reads[0].stored.path
        raise ModelError(f"{path}: tensor {_HEAD} is not the embedding, to which tie_word_embeddings ties it")


class _ByteCounter:
    """Adds up bytes for a report."""

    def __init__(self, total_bytes: int, report: ReportBytes) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._report = report
        report(0, total_bytes)

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._report(self._done_bytes, self._total_bytes)
