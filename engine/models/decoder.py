"""A decoder of the Llama kind as a forward pass that can rest between layers and wherever its LoRA hook waits.

Llama, Mistral, Qwen2 and Qwen3 differ in biases, norms of queries and keys, and sliding windows; the ModelConfig tells.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.attention import AttentionStep
from segue.engine.batch import RowBatch
from segue.engine.lora.points import LoraHook, LoraPoint
from segue.engine.models.config import ModelConfig
from segue.engine.models.ops import ModelOps, TorchOps
from segue.engine.models.weights import Linear, ModelWeights, ReportBytes, load_weights, random_weights, report_nothing


class DecoderModel:
    """A model on one device. It holds no state of a batch: KV is in the pool, the rest in the running pass."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: ModelOps | None = None) -> None:
        """Without ``ops`` the small operations run in torch."""
        self.config = config
        self.weights = weights
        self._ops = ops or TorchOps(config)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        report: ReportBytes = report_nothing,
    ) -> DecoderModel:
        """The model of a checkpoint folder in ``dtype``. Raises ModelError."""
        return cls(config, load_weights(model_dir, config, dtype, device, report))

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        report: ReportBytes = report_nothing,
    ) -> DecoderModel:
        """A model of this shape with random weights."""
        return cls(config, random_weights(config, dtype, device, report))

    def use(self, ops: ModelOps) -> None:
        """Run the small operations with these from now on."""
        self._ops = ops

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embedding.device

    def forward(
        self, batch: RowBatch, attention: AttentionStep, lora: LoraHook, *, logits: Tensor | None = None
    ) -> Generator[None, None, Tensor]:
        """Run the batch; the generator's value is the logits [rows wanted, vocab], in the weights' dtype.

        They are written into ``logits``, if given.

        ``batch`` is on the model's device, and ``attention`` was begun for it. Yields once between two layers and
        whenever ``lora`` waits. A pass may rest at a yield for any time and other passes may run meanwhile; its
        sequences' pages must not change hands. Keys and values of all rows are in the pool when it ends. A pass that is
        closed early calls no further method of ``lora``.

        Advance it within ``torch.inference_mode()``: a mode held here across a yield would leak into the caller.
        """
        x, residual = self.first(batch.token_ids)
        for layer in range(len(self.weights.layers)):
            if layer:
                yield
            yield from lora.enter_layer(layer)
            x, residual = yield from self.layer(layer, x, residual, batch, attention, lora)
            lora.leave_layer(layer)
        return self.last(x, logits)

    def first(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the first layer: normed hidden states and residual, both [rows, hidden]."""
        residual = functional.embedding(token_ids, self.weights.embedding)
        return self._ops.norm(residual, self.weights.layers[0].input_norm), residual

    def layer(
        self,
        layer: int,
        x: Tensor,
        residual: Tensor,
        batch: RowBatch,
        attention: AttentionStep,
        lora: LoraHook,
        *,
        in_place: bool = False,
    ) -> Generator[None, None, tuple[Tensor, Tensor]]:
        """What goes into the next layer, normed by its weights; behind the last one, rows wanted alone.

        Yields while ``lora`` waits at a point. ``residual`` may be overwritten, and so may ``x`` if ``in_place``: both
        results lie there then wherever ``add_norm`` works in place.
        """
        weights, ops, own = self.weights, self._ops, self.weights.layers[layer]
        attended = yield from self._attention(layer, x, attention, lora)
        inner, residual = ops.add_norm(attended, residual, own.post_attention_norm)
        inner = yield from self._mlp(layer, inner, lora, x if in_place else None)
        is_last = layer + 1 == len(weights.layers)
        if is_last and batch.logit_rows is not None:
            inner, residual = inner[batch.logit_rows], residual[batch.logit_rows]
        next_norm = weights.norm if is_last else weights.layers[layer + 1].input_norm
        return ops.add_norm(inner, residual, next_norm)

    def last(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Logits [rows wanted, vocab] of what the last layer returned; written into ``logits``, if given."""
        head = self.weights.head
        return functional.linear(x, head) if logits is None else torch.mm(x, head.t(), out=logits)

    def _attention(
        self, layer: int, x: Tensor, attention: AttentionStep, lora: LoraHook
    ) -> Generator[None, None, Tensor]:
        config, weights, ops = self.config, self.weights.layers[layer], self._ops
        qkv = yield from _project(ops, lora, layer, LoraPoint.QKV, x, weights.qkv)
        by_head = qkv.view(len(qkv), config.heads + 2 * config.kv_heads, config.head_dim)
        q, k, v = torch.split(by_head, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = ops.norm(q, weights.q_norm), ops.norm(k, weights.k_norm)
        attended = attention.attend(layer, q, k, v).view(len(qkv), config.heads * config.head_dim)
        out: Tensor = yield from _project(ops, lora, layer, LoraPoint.O, attended, weights.o)
        return out

    def _mlp(self, layer: int, x: Tensor, lora: LoraHook, target: Tensor | None) -> Generator[None, None, Tensor]:
        weights, ops = self.weights.layers[layer], self._ops
        gate_up = yield from _project(ops, lora, layer, LoraPoint.GATE_UP, x, weights.gate_up)
        inner = ops.swiglu(gate_up)
        out: Tensor = yield from _project(ops, lora, layer, LoraPoint.DOWN, inner, weights.down, target)
        return out


def _project(
    ops: ModelOps,
    lora: LoraHook,
    layer: int,
    point: LoraPoint,
    x: Tensor,
    linear: Linear,
    target: Tensor | None = None,
) -> Generator[None, None, Tensor]:
    """``linear`` of x [rows, in], with the point's LoRA deltas: [rows, out], in ``target``, if given."""
    lora.begin(layer, point, x)
    out = ops.linear(x, linear.weight, linear.bias, target)
    yield from lora.finish(layer, point, x, out)
    return out
