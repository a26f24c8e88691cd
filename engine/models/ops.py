"""What a layer computes between its matrix products and attention."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.models.config import ModelConfig


class ModelOps(Protocol):
    """The small operations of a layer. Rows are those of a batch."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm over the last dimension of ``x`` [..., features]."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual`` [rows, hidden], and that sum. Either argument may be overwritten."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None = None) -> Tensor:
        """``x`` [rows, in] times ``weight`` [out, in] transposed, plus ``bias`` [out]: [rows, out], in ``target`` if
        given."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``gate_up`` [rows, 2 * inner], which has the gate first: [rows, inner]."""
        ...


class TorchOps:
    """In torch, on any device and in any dtype."""

    def __init__(self, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """As in Zhang and Sennrich, 2019, arXiv:1910.07467, the mean in float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        return weight * normed.to(x.dtype)

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return self.norm(total, weight), total

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None = None) -> Tensor:
        return library_linear(x, weight, bias, target)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


def library_linear(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None) -> Tensor:
    """See ``ModelOps.linear``: through the library that torch calls."""
    if target is None:
        return functional.linear(x, weight, bias)
    transposed = weight.t()
    return torch.mm(x, transposed, out=target) if bias is None else torch.addmm(bias, x, transposed, out=target)
