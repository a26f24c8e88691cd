"""Rotary position embeddings (Su et al., 2021, arXiv:2104.09864) in the variants that checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segue.engine.models.rope_config import RopeConfig, RopeType


class RotaryEmbedding:
    """Cosines and sines for the positions of a batch. ``inverse_frequencies`` is [head_dim / 2] float32."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> None:
        frequencies, self.scale = _PARAMETERS[rope.type](rope, head_dim)
        self.inverse_frequencies = frequencies.to(device)

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, head_dim] in ``dtype`` of ``positions`` [rows] int64, angles made in float32."""
        angles = positions.float()[:, None] * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def table(self, context_tokens: int) -> Tensor:
        """The cosines, then the sines of positions below ``context_tokens``: float32 [context_tokens, head_dim]."""
        positions = torch.arange(context_tokens, device=self.inverse_frequencies.device)
        cos, sin = self.cos_sin(positions, torch.float32)
        half = len(self.inverse_frequencies)
        return torch.cat((cos[:, :half], sin[:, :half]), dim=-1).contiguous()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [rows, heads, head_dim]; cos and sin are [rows, head_dim]. Halves are paired, as in transformers."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def _default(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope.theta**exponents), 1.0


def _linear(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    frequencies, scale = _default(rope, head_dim)
    return frequencies / rope.factor, scale


def _llama3(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    frequencies, scale = _default(rope, head_dim)
    wavelengths = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    blend = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    stretched = torch.where(wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, stretched), scale


def _yarn(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): a ramp over dimensions from kept to interpolated frequencies."""
    kept, _ = _default(rope, head_dim)

    def dimension(rotations: float) -> float:
        """The dimension that turns this often within the pretraining length."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = kept / rope.factor * ramp + kept * (1 - ramp)
    return frequencies, _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


_PARAMETERS = {
    RopeType.DEFAULT: _default,
    RopeType.LINEAR: _linear,
    RopeType.YARN: _yarn,
    RopeType.LLAMA3: _llama3,
}
