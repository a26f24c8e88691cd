"""A decoder of the Llama kind as a forward pass that can rest between layers and wherever its LoRA hook waits.

Llama, Mistral, Qwen2 and Qwen3 differ in biases, norms of queries and keys, and sliding windows; the ModelConfig tells.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from segue.engine.attention import AttentionPlan, paged_attention, write_kv
from segue.engine.batch import RowBatch
from segue.engine.lora.points import LoraHook, LoraPoint
from segue.engine.memory.pool import PagePool
from segue.engine.models.config import ModelConfig
from segue.engine.models.rope import RotaryEmbedding, apply_rotary
from segue.engine.models.weights import Linear, ModelWeights, load_weights


class DecoderModel:
    """A model on one device. It holds no state of a batch: KV is in the pool, the rest in the running pass."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, weights.embedding.device)

    @classmethod
    def load(
        cls, model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> DecoderModel:
        """The model of a checkpoint folder in ``dtype``. Raises ModelError."""
        return cls(config, load_weights(model_dir, config, dtype, device))

    def forward(self, batch: RowBatch, pool: PagePool, lora: LoraHook) -> Generator[None, None, Tensor]:
        """Run the batch; the generator's value is the logits [len(batch.logit_rows), vocab] float32.

        Yields once between two layers and whenever ``lora`` waits. A pass may rest at a yield for any time and other
        passes may run meanwhile; its sequences' pages must not change hands. Keys and values of all rows are in
        ``pool`` when it ends. A pass that is closed early calls no further method of ``lora``.

        Advance it within ``torch.inference_mode()``: a mode held here across a yield would leak into the caller.
        """
        weights = self.weights
        hidden = functional.embedding(batch.token_ids, weights.embedding)
        cos_sin = self._rotary.cos_sin(batch.positions, hidden.dtype)
        windows = self.config.sliding_windows
        plans = {window: AttentionPlan.of(batch, pool.page_tokens, window) for window in set(windows)}
        for layer, window in enumerate(windows):
            if layer:
                yield
            yield from lora.enter_layer(layer)
            hidden = yield from self._attention(layer, hidden, cos_sin, batch, plans[window], pool, lora)
            hidden = yield from self._mlp(layer, hidden, lora)
            lora.leave_layer(layer)
        last = self._norm(hidden[batch.logit_rows], weights.norm)
        return functional.linear(last, weights.head).float()

    def _attention(
        self,
        layer: int,
        hidden: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        batch: RowBatch,
        plan: AttentionPlan,
        pool: PagePool,
        lora: LoraHook,
    ) -> Generator[None, None, Tensor]:
        config, weights = self.config, self.weights.layers[layer]
        x = self._norm(hidden, weights.input_norm)
        qkv = yield from _project(lora, layer, LoraPoint.QKV, x, weights.qkv)
        by_head = qkv.view(len(qkv), config.heads + 2 * config.kv_heads, config.head_dim)
        q, k, v = torch.split(by_head, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = self._norm(q, weights.q_norm), self._norm(k, weights.k_norm)
        q, k = apply_rotary(q, *cos_sin), apply_rotary(k, *cos_sin)
        kv = pool.kv(layer)
        write_kv(kv, batch.slot_pages, batch.slot_offsets, k, v)
        attended = paged_attention(q, kv, plan).view(len(qkv), config.heads * config.head_dim)
        out = yield from _project(lora, layer, LoraPoint.O, attended, weights.o)
        return hidden + out

    def _mlp(self, layer: int, hidden: Tensor, lora: LoraHook) -> Generator[None, None, Tensor]:
        weights = self.weights.layers[layer]
        x = self._norm(hidden, weights.post_attention_norm)
        gate_up = yield from _project(lora, layer, LoraPoint.GATE_UP, x, weights.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        out = yield from _project(lora, layer, LoraPoint.DOWN, functional.silu(gate) * up, weights.down)
        return hidden + out

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm (Zhang and Sennrich, 2019, arXiv:1910.07467), the mean in float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * normed.to(x.dtype)


def _project(lora: LoraHook, layer: int, point: LoraPoint, x: Tensor, linear: Linear) -> Generator[None, None, Tensor]:
    """``linear`` of x [rows, in], with the point's LoRA deltas: [rows, out]."""
    lora.begin(layer, point, x)
    out = functional.linear(x, linear.weight, linear.bias)
    yield from lora.finish(layer, point, x, out)
    return out
