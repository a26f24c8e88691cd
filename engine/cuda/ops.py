"""A layer beyond attention and LoRA: FlashInfer's kernels, and products of few rows by our own."""

from __future__ import annotations

from flashinfer.activation import silu_and_mul
from flashinfer.norm import fused_add_rmsnorm, rmsnorm
from torch import Tensor

from segue.engine.models.config import ModelConfig
from segue.engine.models.ops import library_linear
from segue.gpu_kernels.few_rows_linear import choose_tiles, few_rows_linear


class CudaOps:
    """See segue.engine.models.ops.ModelOps. For 16-bit dtypes."""

    def __init__(self, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        features = x.shape[-1]
        normed: Tensor = rmsnorm(x.reshape(-1, features), weight, self._eps)
        return normed.view(x.shape)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        fused_add_rmsnorm(x, residual, weight, self._eps)
        return x, residual

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None = None) -> Tensor:
        tiles = choose_tiles(len(x), *weight.shape)
        if tiles is None:
            return library_linear(x, weight, bias, target)
        return few_rows_linear(x, weight, bias, tiles, out=target)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        product: Tensor = silu_and_mul(gate_up)
        return product
