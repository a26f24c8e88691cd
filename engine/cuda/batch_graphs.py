"""Batches as recorded passes, CUDA graphs: one for each shape and kind of work, replayed whatever is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from segue.engine.attention import AttentionStep
from segue.engine.batch import RowBatch
from segue.engine.cuda.batch_inputs import BatchInputs, BatchMemory
from segue.engine.cuda.batch_shapes import AttentionKind, BatchShape, attention_kind, attention_kinds
from segue.engine.cuda.lora import GraphLora, GraphPlans, KernelLora, regime_of
from segue.engine.forward_pass import RequestRows
from segue.engine.lora.device_lora import LoraSegment
from segue.engine.lora.points import LoraHook, LoraPoint
from segue.engine.memory.pool import PagePool
from segue.engine.models.decoder import DecoderModel
from segue.gpu_kernels.lora_tiles import Regime


class RecordableAttention(AttentionStep, Protocol):
    """Attention whose launches find all that changes from run to run in buffers that stay."""

    def plan(self) -> None:
        """Divide the work of the inputs, which are filled. All runs but the last must have ended."""
        ...


class BatchAttention(Protocol):
    """Makes the attention of recorded batches, which share memory, since one runs after the other."""

    def begin(self, inputs: BatchInputs, kind: AttentionKind) -> RecordableAttention:
        """The attention of the batches that these inputs bring."""
        ...


class Recorder(Protocol):
    """Records what a pass enqueues, to do it again by one call."""

    def record(self, run: Callable[[], None], rows: int) -> Callable[[], None]:
        """What does again what ``run``, a pass over ``rows`` rows, enqueues: on the same memory. Runs it, too."""
        ...


class Variant(Enum):
    """Which LoRA points a graph has launches for: a point without work costs its launches all the same."""

    BASE = frozenset[LoraPoint]()
    ATTENTION = frozenset({LoraPoint.QKV, LoraPoint.O})
    ALL = frozenset(LoraPoint)


class BatchGraph:
    """One shape, kind of attention, variant and regime."""

    def __init__(
        self,
        model: DecoderModel,
        attention: RecordableAttention,
        inputs: BatchInputs,
        lora: LoraHook,
        logits: Tensor,
        recorder: Recorder,
    ) -> None:
        """Record the pass. Graphs share ``logits`` [sequences, vocab]: one runs at a time."""
        self._inputs = inputs
        self._attention = attention
        self._logits = logits
        at = inputs.on_device
        batch = RowBatch(
            token_ids=at.token_ids,
            positions=at.positions,
            sequences=(),
            slot_pages=at.positions,
            slot_offsets=at.positions,
            logit_rows=None if inputs.shape.decodes else at.logit_rows,
        )
        inputs.fill(())
        attention.plan()
        self._replay = recorder.record(lambda: _drain(model, batch, attention, lora, logits), inputs.shape.rows)

    def run(self, rows: Sequence[RequestRows]) -> Tensor:
        """Logits [len(rows), vocab], valid until the next run of any graph.

        All runs but the last have ended.
        """
        self._inputs.fill(rows)
        self._attention.plan()
        self._replay()
        return self._logits[: len(rows)]


class BatchGraphs:
    """The graphs of a model, each recorded when a batch first needs it, or ahead by ``record_all``."""

    def __init__(
        self,
        model: DecoderModel,
        pool: PagePool,
        attention: BatchAttention,
        lora: KernelLora,
        recorder: Recorder,
        shapes: Sequence[BatchShape],
        *,
        max_sequences: int,
        context_tokens: int,
    ) -> None:
        """``shapes`` in the order in which they are tried; ``context_tokens`` bounds each sequence."""
        self._model = model
        self._pool = pool
        self._lora = lora
        self._recorder = recorder
        self._attention = attention
        self._group = model.config.heads // model.config.kv_heads
        self.shapes = tuple(shapes)
        largest = BatchShape(max(item.rows for item in self.shapes), max(item.sequences for item in self.shapes))
        self._plans = GraphPlans(lora, largest.rows)
        max_pages = pool.token_pages(context_tokens) * max_sequences
        self._batch_memory = BatchMemory(largest, max_pages, model.device)
        self._inputs: dict[BatchShape, BatchInputs] = {}
        self._attentions: dict[tuple[BatchShape, AttentionKind], RecordableAttention] = {}
        self._graphs: dict[tuple[BatchShape, AttentionKind, Variant, Regime | None], BatchGraph] = {}
        self._logits = torch.empty(largest.sequences, model.config.vocab_size, dtype=pool.dtype, device=model.device)

    def run(self, rows: Sequence[RequestRows], segments: Sequence[LoraSegment]) -> Tensor | None:
        """Logits [len(rows), vocab] of each request's last row, valid until the next run; None where no shape
        holds the batch."""
        row_count = sum(item.count for item in rows)
        shape = next((shape for shape in self.shapes if shape.holds(row_count, len(rows))), None)
        if shape is None:
            return None
        regime = self._lora.regime(segments)
        used = self._plans.fill(segments, regime)
        variant = next(item for item in Variant if used <= item.value)
        kind = attention_kind(shape, self._group, [item.start + item.count for item in rows])
        return self._graph(shape, kind, variant, regime).run(rows)

    @torch.inference_mode()
    def record_all(self, report: Callable[[int, int], None]) -> None:
        """Record the graphs of all batches without long KV; ``report`` is told how many of how many there are."""
        kinds = list(self._kinds())
        for done, (shape, kind, variant, regime) in enumerate(kinds):
            report(done, len(kinds))
            self._plans.fill((), regime)
            self._graph(shape, kind, variant, regime)
        report(len(kinds), len(kinds))

    def _kinds(self) -> Iterator[tuple[BatchShape, AttentionKind, Variant, Regime]]:
        for shape in self.shapes:
            # Of segments with one row each and of one with all, of low and of high ranks.
            regimes = {regime_of(shape.rows, [rank] * count) for rank in (1, 256) for count in (1, shape.sequences)}
            for kind in attention_kinds(shape, self._group):
                yield shape, kind, Variant.BASE, Regime.FEW
                for regime in sorted(regimes, key=lambda item: item.value):
                    yield shape, kind, Variant.ATTENTION, regime
                    yield shape, kind, Variant.ALL, regime

    def _graph(self, shape: BatchShape, kind: AttentionKind, variant: Variant, regime: Regime) -> BatchGraph:
        key = shape, kind, variant, None if variant is Variant.BASE else regime
        graph = self._graphs.get(key)
        if graph is None:
            hook = GraphLora(self._lora, self._plans, variant.value, regime)
            inputs, attention = self._parts(shape, kind)
            logits = self._logits[: shape.sequences]
            graph = self._graphs[key] = BatchGraph(self._model, attention, inputs, hook, logits, self._recorder)
        return graph

    def _parts(self, shape: BatchShape, kind: AttentionKind) -> tuple[BatchInputs, RecordableAttention]:
        """What the graphs of a shape share."""
        inputs = self._inputs.get(shape)
        if inputs is None:
            pool = self._pool
            inputs = BatchInputs(shape, self._batch_memory, pool.page_tokens, pool.padding_page)
            self._inputs[shape] = inputs
        attention = self._attentions.get((shape, kind))
        if attention is None:
            attention = self._attentions[shape, kind] = self._attention.begin(inputs, kind)
        return inputs, attention


def _drain(model: DecoderModel, batch: RowBatch, step: AttentionStep, lora: LoraHook, logits: Tensor) -> None:
    """Run a pass that waits for nothing."""
    for _ in model.forward(batch, step, lora, logits=logits):
        pass
