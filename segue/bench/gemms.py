"""The matrix products of a step alone: what no engine on the same machine can be faster than."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.models.config import ModelConfig


class Gemms:
    """Random weights of all of a model's merged linear layers, the head included, none used twice in a step.

    They take as much memory as the model's own, which must be there besides.
    """

    def __init__(self, model: ModelConfig, *, batches: Sequence[int], dtype: torch.dtype, device: str) -> None:
        self._weights = [
            torch.empty(size, dtype=dtype, device=device).normal_(0.0, size[1] ** -0.5) for size in _sizes(model)
        ]
        widths = {weight.shape[1] for weight in self._weights}
        self._inputs: dict[int, dict[int, Tensor]] = {
            batch: {width: torch.randn(batch, width, device=device).to(dtype) for width in widths} for batch in batches
        }

    @torch.inference_mode()
    def seconds(self, batch: int) -> float:
        """The time that one row for each of ``batch`` sequences takes through all of the weights."""
        inputs = self._inputs[batch]
        start_seconds = time.perf_counter()
        for weight in self._weights:
            out = functional.linear(inputs[weight.shape[1]], weight)
        # Reading a value waits for any device to have computed it.
        out[0, 0].item()
        return time.perf_counter() - start_seconds


def _sizes(model: ModelConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of qkv, o, gate_up and down in every layer, and of the head."""
    hidden, inner = model.hidden_size, model.intermediate_size
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = [(query + 2 * key, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)]
    return [*(layer * model.layers), (model.vocab_size, hidden)]
