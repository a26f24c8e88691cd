"""The small operations of a layer through FlashInfer's kernels."""

from __future__ import annotations

import torch
from flashinfer.activation import silu_and_mul
from flashinfer.norm import fused_add_rmsnorm, rmsnorm
from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
from torch import Tensor

from segue.engine.models.config import ModelConfig
from segue.engine.models.rope import RotaryEmbedding


class FlashInferOps:
    """See segue.engine.models.ops.ModelOps. For 16-bit dtypes.

    Cosines and sines are made once for all positions below ``context_tokens``: float32 [context_tokens, head_dim].
    """

    def __init__(self, config: ModelConfig, device: torch.device, context_tokens: int) -> None:
        self._eps = config.rms_norm_eps
        self._head_dim = config.head_dim
        rotary = RotaryEmbedding(config.rope, config.head_dim, device)
        cos, sin = rotary.cos_sin(torch.arange(context_tokens, device=device), torch.float32)
        half = config.head_dim // 2
        self._cos_sin = torch.cat((cos[:, :half], sin[:, :half]), dim=-1).contiguous()

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        features = x.shape[-1]
        normed: Tensor = rmsnorm(x.reshape(-1, features), weight, self._eps)
        return normed.view(x.shape)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, residual, weight, self._eps)
        return x, residual

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(positions)
        apply_rope_with_cos_sin_cache_inplace(positions, q.flatten(1), k.flatten(1), self._head_dim, self._cos_sin)
        return q.view(rows, -1, self._head_dim), k.view(rows, -1, self._head_dim)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        product: Tensor = silu_and_mul(gate_up)
        return product
