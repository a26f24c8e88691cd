"""Decode steps as CUDA graphs: one for each batch bucket, replayed whatever requests are in it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from segue.engine.batch import RowBatch
from segue.engine.cuda.attention import DecodeStep, FlashInferAttention
from segue.engine.cuda.decode_inputs import DecodeInputs
from segue.engine.cuda.lora import GraphLora, GraphPlans, KernelLora, regime_of
from segue.engine.forward_pass import RequestRows
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.points import LoraHook, LoraPoint
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that are captured: 1, 2, 4, then every 8 to 64, every 16 to 256, every 64 beyond."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(320, max_rows + 64, 64)}
    return (*sorted(size for size in sizes if size < max_rows), max_rows)


class DecodeGraph:
    """One bucket and variant."""

    def __init__(
        self, model: DecoderModel, attention: FlashInferAttention, inputs: DecodeInputs, lora: LoraHook, memory: Any
    ) -> None:
        """Record the pass. ``memory`` is the pool that graphs share, since they never run at once."""
        self._inputs = inputs
        self._step = attention.begin_decodes(inputs)
        self._graph = torch.cuda.CUDAGraph()
        batch = RowBatch(
            token_ids=inputs.on_device.token_ids,
            positions=inputs.on_device.positions,
            sequences=(),
            slot_pages=inputs.on_device.positions,
            slot_offsets=inputs.on_device.positions,
            logit_rows=inputs.on_device.positions,
        )
        inputs.fill(())
        self._step.plan()
        _drain(model, batch, self._step, lora)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, pool=memory):
            self._logits = _drain(model, batch, self._step, lora)

    def run(self, rows: Sequence[RequestRows]) -> Tensor:
        """Logits float32 [len(rows), vocab], valid until the next run of any graph."""
        self._inputs.fill(rows)
        self._step.plan()
        self._graph.replay()
        return self._logits[: len(rows)]


class Variant(Enum):
    """Which LoRA points a graph has launches for: a point without work costs its launches all the same."""

    BASE = frozenset[LoraPoint]()
    ATTENTION = frozenset({LoraPoint.QKV, LoraPoint.O})
    ALL = frozenset(LoraPoint)


class DecodeGraphs:
    """The graphs of a model by batch bucket and variant, each captured when a batch first needs it."""

    def __init__(
        self,
        model: DecoderModel,
        pool: PagePool,
        attention: FlashInferAttention,
        lora: KernelLora,
        *,
        max_rows: int,
        context_tokens: int,
    ) -> None:
        """``context_tokens`` bounds each sequence."""
        self._model = model
        self._pool = pool
        self._attention = attention
        self._lora = lora
        self._plans = GraphPlans(lora, max_rows)
        self._sizes = bucket_sizes(max_rows)
        self._sequence_pages = pool.token_pages(context_tokens)
        self._inputs: dict[int, DecodeInputs] = {}
        self._graphs: dict[tuple[int, Variant], DecodeGraph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> Tensor:
        """Logits float32 [len(rows), vocab] of one row for each request, valid until the next run."""
        size = next(size for size in self._sizes if size >= len(rows))
        used = self._plans.fill(segments, regime_of(size, size))
        variant = next(item for item in Variant if used <= item.value)
        graph = self._graphs.get((size, variant))
        if graph is None:
            graph = self._graphs[size, variant] = self._capture(size, variant)
        return graph.run(rows)

    def _capture(self, size: int, variant: Variant) -> DecodeGraph:
        inputs = self._inputs.get(size)
        if inputs is None:
            inputs = self._inputs[size] = DecodeInputs(
                size,
                size * self._sequence_pages,
                self._pool.page_tokens,
                self._pool.padding_page,
                self._model.device,
            )
        hook = GraphLora(self._lora, self._plans.on_device, variant.value, regime_of(size, size))
        return DecodeGraph(self._model, self._attention, inputs, hook, self._memory)


def _drain(model: DecoderModel, batch: RowBatch, step: DecodeStep, lora: LoraHook) -> Tensor:
    """Run a pass that waits for nothing."""
    run = model.forward(batch, step, lora)
    while True:
        try:
            next(run)
        except StopIteration as end:
            logits: Tensor = end.value
            return logits
